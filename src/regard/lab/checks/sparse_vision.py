"""Checks of sparse vision layers and learned gates: BiFormer, HaloNet, Sparsifiner, SeerAttention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal
from ...algebra.blocks import pooled
from ...algebra.permute import tiles
from ...engine import attend
from ...nn.bilevel import BiLevelRoutingAttention
from ...nn.halo import HaloAttention2d
from ...nn.seer import GATED, AttnGate, SeerAttention, block_maxima, gate_loss
from ...nn.sparsifiner import SparsifinerAttention
from .. import naive
from ..verification import check
from .selected import qkv, selection_of

F64 = torch.float64


def routed(layer: BiLevelRoutingAttention, x: Tensor, routes: Tensor) -> Tensor:
    """Bi-level routing with the region mask written out pixel by pixel, for given routes (N, S^2, k)."""
    n, height, width, c = x.shape
    s = layer.regions
    region = (torch.arange(height)[:, None] // (height // s) * s + torch.arange(width) // (width // s)).flatten()
    allowed = torch.zeros(n, s * s, s * s, dtype=torch.bool).scatter_(-1, routes, True)
    mask = allowed[:, region][:, :, region]
    q, k, v = layer.qkv(x).split((layer.qk_dim, layer.qk_dim, c), -1)
    heads = [y.flatten(1, 2).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (q, k, v)]
    scores = (layer.scale * heads[0] @ heads[1].transpose(-1, -2)).masked_fill(~mask[:, None], -math.inf)
    o = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(-2).unflatten(1, (height, width))
    assert layer.lepe is not None
    return layer.out(o + layer.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


def mean_routes(layer: BiLevelRoutingAttention, x: Tensor, count: int) -> Tensor:
    """Top regions from explicit means of q and k over each region."""
    s = layer.regions
    q, k, _ = layer.qkv(x).split((layer.qk_dim, layer.qk_dim, x.shape[-1]), -1)
    means = []
    for y in (q, k):
        h, w = y.shape[1] // s, y.shape[2] // s
        means.append(torch.stack([y[:, a * h : (a + 1) * h, b * w : (b + 1) * w].mean((1, 2)) for a in range(s) for b in range(s)], 1))
    return (means[0] @ means[1].transpose(-1, -2)).topk(count, -1).indices


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


def halo_loop(layer: HaloAttention2d, x: Tensor) -> Tensor:
    """Pixel by pixel, as written in the paper."""
    n, _, height, width = x.shape
    b, h, p, d, e = layer.block, layer.halo, layer.patch, layer.head_dim, layer.value_dim
    q, kv = layer.q(x).unflatten(1, (layer.heads, d)), layer.kv(x).unflatten(1, (layer.heads, d + e))
    out = torch.zeros(n, layer.heads, e, height // layer.stride, width // layer.stride, dtype=x.dtype)
    for i in range(0, height, layer.stride):
        for j in range(0, width, layer.stride):
            top, left = i // b * b - h, j // b * b - h
            logits, values = [], []
            for a in range(top, top + p):
                for c in range(left, left + p):
                    inside = 0 <= a < height and 0 <= c < width
                    if not inside and layer.masked:
                        continue
                    kk, vv = (
                        kv[..., a, c].split((d, e), -1)
                        if inside
                        else (torch.zeros(n, layer.heads, d, dtype=x.dtype), torch.zeros(n, layer.heads, e, dtype=x.dtype))
                    )
                    relative = layer.rel_h[a - i + p - 1] + layer.rel_w[c - j + p - 1]
                    logits.append((q[..., i, j] * (d**-0.5 * kk + relative)).sum(-1))
                    values.append(vv)
            w = torch.stack(logits, -1).softmax(-1)
            out[..., i // layer.stride, j // layer.stride] = torch.einsum("nhk,knhe->nhe", w, torch.stack(values))
    return layer.project(out.flatten(1, 2))  # type: ignore[no-any-return]


@check(
    "halonet",
    "equals a loop over pixels for (b, h) = (4, 2), (4, 1), (6, 3), padding masked and not, and stride 2",
    below=1e-10,
    control="relative logits left out",
)
def _() -> tuple[float, float]:
    x, own, other = torch.randn(2, 6, 12, 12, dtype=F64), 0.0, 0.0
    for block, halo, masked, stride in ((4, 2, True, 1), (4, 1, False, 1), (6, 3, True, 1), (6, 3, False, 1), (4, 1, True, 2)):
        layer = HaloAttention2d(6, 6, 3, block=block, halo=halo, masked=masked, stride=stride, head_dim=4).double()
        truth = halo_loop(layer, x).detach()
        own = max(own, naive.gap(layer(x), truth))
        layer.relative = "none"
        other = max(other, naive.gap(layer(x), truth))
    return own, other


@check("halonet", "h = 0 without relative logits is window attention", below=1e-12, control="h = 1")
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 6, 12, 12, dtype=F64), []
    for halo in (0, 1):
        torch.manual_seed(1)
        layer = HaloAttention2d(6, 6, 3, block=4, halo=halo, head_dim=4, relative="none").double()
        windows = x.unflatten(3, (3, 4)).unflatten(2, (3, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        q, kv = (
            layer.q(windows).flatten(2).unflatten(1, (3, 4)).transpose(-1, -2),
            layer.kv(windows).flatten(2).unflatten(1, (3, 6)).transpose(-1, -2),
        )
        o = attend(q, *kv.split((4, 2), -1)).transpose(-1, -2).flatten(1, 2).unflatten(2, (4, 4))
        truth = o.unflatten(0, (2, 3, 3)).permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3)
        gaps.append(naive.gap(layer(x), truth))
    return gaps[0], gaps[1]


@check("halonet", "moving the map by a block moves the output (interior): gap", below=1e-10, control="moving it by one pixel")
def _() -> tuple[float, float]:
    layer, x = HaloAttention2d(6, 6, 3, block=4, halo=1, head_dim=4).double(), torch.randn(1, 6, 24, 24, dtype=F64)
    out = layer(x)
    return tuple(naive.gap(layer(x.roll(step, -1))[..., 8:16, 12:16], out.roll(step, -1)[..., 8:16, 12:16]) for step in (4, 1))  # type: ignore[return-value]


@check(
    "sparsifiner",
    "keep = 1 is dense attention; 0.25 has ceil(N / 4) keys a row (class row all) and equals dense masked softmax",
    below=1e-12,
    control="keep = 0.25 against dense",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 65, 32, dtype=F64)
    layer = SparsifinerAttention(32, 4, 65, keep=1.0).double()
    q, k, v = layer.split(x)
    dense = layer.out(attend(q, k, v).transpose(1, 2).flatten(-2))
    own = naive.gap(layer(x), dense)
    layer.keep = 0.25
    out = layer(x)
    counts = layer.mask.sum(-1)
    wrong = float((counts[..., 1:] != 17).sum() + (counts[..., 0] != 65).sum())
    truth = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~layer.mask, -math.inf).softmax(-1) @ v
    return max(own, naive.gap(out, layer.out(truth.transpose(1, 2).flatten(-2)))) + wrong, naive.gap(out, dense)


@check(
    "sparsifiner",
    "a predictor trained by reconstruction: mass of its top 17 over the teacher's own, new samples",
    above=0.95,
    control="one fixed mask for all inputs",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    directions, place = torch.randn(6, 16), torch.randn(65, 16)
    mixtures = torch.zeros(6, 65)
    for row in mixtures:
        row[torch.randperm(65)[:12]] = 1 / 12

    def sample(count: int) -> tuple[Tensor, Tensor]:
        content = torch.randn(count, 65, 16)
        weights = (4 * content @ directions.T / 4).softmax(-1)
        return torch.cat((content, place.expand(count, -1, -1)), -1)[:, None], (0.95 * weights @ mixtures + 0.05 / 65)[:, None]

    layer = SparsifinerAttention(32, 1, 65, rank=8, exclude_class=False)
    parameters = [layer.reduce_q.weight, layer.reduce_k.weight, layer.down, layer.up]
    step = torch.optim.Adam(parameters, lr=3e-2)
    for _ in range(600):
        x, teacher = sample(32)
        loss = layer.reconstruction(x, x, teacher)
        step.zero_grad()
        loss.backward()
        step.step()
    x, teacher = sample(64)
    oracle = teacher.topk(17, -1).values.sum()
    chosen = layer.predict(x, x).topk(17, -1).indices
    fixed = sample(256)[1].mean(0, keepdim=True).topk(17, -1).indices.expand_as(chosen)
    return tuple(float(teacher.gather(-1, at).sum() / oracle) for at in (chosen, fixed))  # type: ignore[return-value]


@check(
    "seerattention",
    "the tiled ground truth equals max-pooling of the full map, causal, grouped heads, normalised and not",
    below=1e-10,
    control="mean-pooling",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(320, 8, 4, 2)
    causal = torch.ones(320, 320, dtype=torch.bool).tril()
    p = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)).masked_fill(~causal, -math.inf).softmax(-1)
    blocks = p.unflatten(-1, (10, 32)).unflatten(-3, (10, 32))
    truth, mean = blocks.amax((-1, -3)), blocks.mean((-1, -3))
    own = max(naive.gap(block_maxima(q, k, 32, False), truth), naive.gap(block_maxima(q, k, 32), truth / truth.sum(-1, keepdim=True)))
    return own, naive.gap(block_maxima(q, k, 32, False), mean)


def topics(count: int, generator: torch.Generator, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Queries constant a block; needles in 80% of key blocks, cancelled by the rest of their block."""
    at = torch.randint(6, (count, 16), generator=generator)
    q = (4 * directions[at] + 0.5 * torch.randn(count, 16, 16, generator=generator)).repeat_interleave(16, 1)
    k = 0.5 * torch.randn(count, 16, 16, 16, generator=generator)
    topic, spot = torch.randint(6, (count, 16), generator=generator), torch.randint(16, (count, 16), generator=generator)
    needle = 4 * directions[topic] * (torch.rand(count, 16, 1, generator=generator) < 0.8)
    k = k - needle[:, :, None] / 15
    k.scatter_add_(2, spot[..., None, None].expand(-1, -1, 1, 16), (needle * 16 / 15)[:, :, None])
    return q[:, None], k.flatten(1, 2)[:, None]


@check(
    "seerattention",
    "needles hidden from the mean: mass in the trained gate's top 3 blocks over the true top 3's",
    above=0.9,
    control="mean-pooled keys",
)
def _() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(6, 16, generator=generator), dim=-1)
    gate = AttnGate(1, 1, 16, width=32, block_size=16, rope=False)
    step = torch.optim.Adam(gate.parameters(), lr=5e-3)
    for _ in range(300):
        q, k = topics(32, generator, directions)
        loss = gate_loss(gate(q, k), block_maxima(q, k, 16))
        step.zero_grad()
        loss.backward()
        step.step()
    q, k = topics(64, generator, directions)
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    p = (q @ k.transpose(-1, -2) / 4).masked_fill(~causal, -math.inf).softmax(-1)
    mass = p.unflatten(-1, (16, 16)).sum(-1).unflatten(-2, (16, 16)).mean(-2)[..., 4:, :]
    best = mass.topk(3, -1).values.sum()
    seen = torch.ones(16, 16, dtype=torch.bool).tril()
    means = (pooled(q, 16) @ pooled(k, 16).transpose(-1, -2)).masked_fill(~seen, -math.inf)
    return tuple(float(mass.gather(-1, s[..., 4:, :].topk(3, -1).indices).sum() / best) for s in (gate(q, k), means))  # type: ignore[return-value]


@check(
    "seerattention",
    "realised density for ratio 0.1, 0.3, 0.5 and 0.9: largest difference; threshold 0 is dense",
    below=0.02,
    control="ratio as a share of each whole row",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(1024, 16, 2)
    layer = SeerAttention(2, 2, 16, width=16, block_size=8, threshold=0.0).double()
    turned = layer.rotated(q, k)
    dense = naive.gap(layer(q, k, v), attend(*turned, v, mask=Causal()))
    logits = layer.gate(q, k).detach()
    worst = plain = 0.0
    available = 128 * 129 / 2
    for ratio in (0.1, 0.3, 0.5, 0.9):
        given = {name: torch.tensor(x) for name, x in (("threshold", 0.0), ("ratio", ratio), ("size", 8), ("last_dense", 0))}
        keep = selection_of(GATED.select, q, k, gate=logits, **given).keep
        worst = max(worst, abs(float(keep.sum()) / 2 / available - ratio))
        plain = max(plain, abs(sum(min(u + 1, round(ratio * 128)) for u in range(128)) / available - ratio))
    return worst if dense < 1e-10 else math.inf, plain


@check("seerattention", "in gate-only training q and k get no gradient: largest", below=0, control="the gate's own gradient")
def _() -> tuple[float, float]:
    layer, (q, k, _) = SeerAttention(2, 2, 16, width=16, block_size=8).double(), (x.requires_grad_() for x in qkv(64, 16, 2))
    layer.distil(q, k).backward()
    assert layer.gate.q is not None and layer.gate.q.grad is not None
    return max(0.0 if x.grad is None else float(x.grad.abs().max()) for x in (q, k)), float(layer.gate.q.grad.abs().max())
