"""Checks of biformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra.permute import tiles
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import standard
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.sparse_vision import mean_routes, routed
from regard.lab.verification import check
from regard.zoo.sparse.biformer import BiFormer, BiLevelRoutingAttention, region_routes


@check(
    "biformer",
    "top_k = S^2 is full attention with LePE; top_k = 3 the region mask of explicit means, with gradients",
    below=1e-10,
    control="the wrong regions",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 12, 12, 16, dtype=F64, requires_grad=True)
    own = other = 0.0
    for count in (9, 3):
        layer = BiLevelRoutingAttention(16, 4, regions=3, top_k=count).double()
        out, seed = layer(x), torch.randn(2, 12, 12, 16, dtype=F64)
        routes = mean_routes(layer, x, count)
        truth = routed(layer, x, routes)
        grads = [torch.autograd.grad((y * seed).sum(), x)[0] for y in (out, truth)]
        own = max(own, naive.gap(out, truth), naive.gap(*grads))
        other = naive.gap(out, routed(layer, x, (routes + 1) % 9))
    return own, other


@check("biformer", "gather path (soft, weights undone) equals the mask path", below=1e-10, control="soft weights left in")
def _() -> tuple[float, float]:
    layer, x = BiLevelRoutingAttention(16, 4, regions=3, top_k=3).double(), torch.randn(2, 12, 12, 16, dtype=F64)
    truth = layer(x)
    order = tiles((12, 12), (4, 4))
    flat = [order.apply(y.flatten(1, 2)) for y in layer.qkv(x).split((16, 16, 16), -1)]
    assert layer.lepe is not None
    lepe = layer.lepe(order.invert(flat[2]).unflatten(1, (12, 12)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    gaps = []
    for weights in (torch.ones_like(layer.routes, dtype=F64), layer.route_logits.gather(-1, layer.routes).softmax(-1)):
        o = layer.gathered(flat, layer.routes, weights, torch.ones(1, 144, dtype=torch.bool))
        gaps.append(naive.gap(layer.out(order.invert(o).unflatten(1, (12, 12)) + lepe), truth))
    return gaps[0], gaps[1]


@check(
    "biformer",
    "gradient reaches the routing only when soft and differentiable: largest gradient of the logits otherwise",
    below=0,
    control="soft and differentiable",
)
def _() -> tuple[float, float]:
    found = []
    for flag in (False, True):
        layer = BiLevelRoutingAttention(16, 4, regions=3, top_k=3, soft=flag, differentiable=flag).double()
        out = layer(torch.randn(1, 12, 12, 16, dtype=F64))
        needed = layer.route_logits.requires_grad
        found.append(float(torch.autograd.grad(out.square().sum(), layer.route_logits)[0].abs().max()) if needed else 0.0)
    return found[0], found[1]


@check(
    "biformer",
    "13 x 11 with auto_pad: same shape, padding not attended to (equals the valid pixels alone when one region is all)",
    below=1e-10,
    control="padded keys attended to",
)
def _() -> tuple[float, float]:
    layer = BiLevelRoutingAttention(16, 4, regions=2, top_k=4, lepe=0, auto_pad=True).double()
    x = torch.randn(1, 13, 11, 16, dtype=F64)

    def full(y: Tensor) -> Tensor:
        heads = [z.flatten(1, 2).unflatten(-1, (4, -1)).transpose(1, 2) for z in layer.qkv(y).split((16, 16, 16), -1)]
        return layer.out(attend(*heads, scale=layer.scale).transpose(1, 2).flatten(-2)).unflatten(1, tuple(y.shape[1:3]))  # type: ignore[no-any-return]

    padded = full(F.pad(x, (0, 0, 0, 1, 0, 1)))[:, :13, :11]
    return naive.gap(layer(x), full(x)), naive.gap(layer(x), padded)


@check(
    "biformer",
    "routes of given q and k equal those of the layer's own, and means by hand; a block and a net equal their parts put together by hand",
    below=1e-10,
    control="a net without its positions' convolution",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    layer, x = BiLevelRoutingAttention(16, 4, regions=3, top_k=3).double(), torch.randn(2, 12, 12, 16, dtype=F64)
    layer(x)
    q, k, _ = layer.qkv(x).chunk(3, -1)
    routes, logits = region_routes(q, k, 3, 3)
    own = float((routes != layer.routes).sum() + (routes != mean_routes(layer, x, 3)).sum()) + naive.gap(logits, layer.route_logits)

    net, image = BiFormer(5, widths=(16, 24)).double(), torch.randn(2, 16, 32, 3, dtype=F64)

    def by_hand(placed: bool) -> Tensor:
        y = image
        for merge, stage in zip(net.merges, net.stages, strict=True):
            size = merge.kernel_size[0]  # type: ignore[index, union-attr]
            patches = y.unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(0, 1, 3, 5, 2, 4).flatten(3)
            y = patches @ merge.weight.flatten(1).T + merge.bias  # type: ignore[union-attr, operator]
            for block in stage:  # type: ignore[attr-defined]
                around = F.pad(y, (0, 0, 1, 1, 1, 1))
                near = torch.stack([around[:, a : a + y.shape[1], b : b + y.shape[2]] for a in range(3) for b in range(3)], -1)
                y = y + placed * ((near * block.place.weight.flatten(1)).sum(-1) + block.place.bias)
                n = standard(y) * block.norm1.weight + block.norm1.bias
                y = y + routed(block.mixer, n, mean_routes(block.mixer, n, block.mixer.top_k))
                n = standard(y) * block.norm2.weight + block.norm2.bias
                h = n @ block.mlp[0].weight.T + block.mlp[0].bias
                h = h * (1 + torch.erf(h / 2**0.5)) / 2
                y = y + h @ block.mlp[2].weight.T + block.mlp[2].bias
        return net.head(standard(y.mean((1, 2))) * net.norm.weight + net.norm.bias)  # type: ignore[no-any-return]

    return max(own, naive.gap(net(image), by_hand(True))), naive.gap(net(image), by_hand(False))


@check(
    "biformer",
    "a tiny net tells in which of four corners a bright patch lies, 40 steps from scratch: accuracy on new images",
    above=0.8,
    control="without training",
)
def _() -> tuple[float, float]:
    def images(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, where = torch.randn(32, 16, 16, 3, generator=generator), torch.randint(4, (32,), generator=generator)
        for n, place in enumerate(where.tolist()):
            x[n, place // 2 * 8 : place // 2 * 8 + 8, place % 2 * 8 : place % 2 * 8 + 8] += 1.5
        return x, where

    found = []
    for steps in (40, 0):
        torch.manual_seed(0)
        net = BiFormer(4)
        optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
        for step in range(steps):
            x, where = images(step)
            optimizer.zero_grad()
            F.cross_entropy(net(x), where).backward()
            optimizer.step()
        with torch.no_grad():
            guesses = [(net(x).argmax(-1) == where).float().mean() for x, where in (images(1000 + n) for n in range(4))]
        found.append(float(torch.stack(guesses).mean()))
    return found[0], found[1]
