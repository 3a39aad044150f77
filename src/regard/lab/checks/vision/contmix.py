"""Checks of contmix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import silu
from regard.lab.checks.shared.planes import batch_norm, depthwise, gelu, image, layer_norm, pointwise, settled
from regard.lab.checks.shared.training import accuracy, trained
from regard.lab.verification import check
from regard.nn.images import timm_host
from regard.nn.images.dynamic_kernels import DynamicKernels
from regard.nn.images.large_kernels import DilatedReparam, RepConvBlock, Residual, SqueezeExcite, merged
from regard.tasks.images import scenes
from regard.zoo.vision.contmix import ContMix, OverLoCK, overlock


def norm(x: Tensor, layer: Any) -> Tensor:
    return layer_norm(x.movedim(1, -1), layer.norm, 1e-6).movedim(-1, 1)


def folded(x: Tensor, layer: Any) -> Tensor:
    """conv_1x1 without bias, BatchNorm."""
    conv, bn = layer[:2]
    return batch_norm(pointwise(x, conv.weight), bn)


def cells(x: Tensor, pool: int) -> Tensor:
    """Means over pool x pool cells, which overlap where sides are no multiples."""
    h, w = x.shape[2:]
    rows = [(h * i // pool, -(-h * (i + 1) // pool)) for i in range(pool)]
    columns = [(w * i // pool, -(-w * (i + 1) // pool)) for i in range(pool)]
    return torch.stack([torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in columns], -1) for a, b in rows], -2)


def windows(layer: DynamicKernels, query: Tensor, context: Tensor, value: Tensor, shifted: bool = True) -> Tensor:
    """Pixel by pixel; not shifted: windows around every pixel, zeros outside the map."""
    c, h, w = query.shape[1:]
    q, k = folded(query, layer.query), folded(cells(context, layer.pool), layer.key)
    groups, width, half = layer.groups, c // layer.groups // 2, c // 2
    out = torch.zeros_like(value)
    for g in range(groups):
        own = slice(g * width, (g + 1) * width)
        for i in range(h):
            for j in range(w):
                likeness = torch.einsum("bc,bchw->bhw", q[:, own, i, j], k[:, own]).flatten(1) * (c / groups) ** -0.5
                logits = likeness @ layer.logits.weight.T + layer.logits.bias
                for size, table, start, part in (
                    (layer.small, layer.near, 0, 0),
                    (layer.kernel, layer.far, layer.small**2, half),
                ):
                    top, left = ((min(max(at - size // 2, 0), n - size) if shifted else at - size // 2) for at, n in ((i, h), (j, w)))
                    rows = []
                    for a in range(size):
                        for d in range(size):
                            bias = table[g, top + a - i + size - 1, left + d - j + size - 1]
                            rows.append(logits[:, start + a * size + d] + bias)
                    p = torch.stack(rows, -1).softmax(-1)
                    mine = slice(part + g * width, part + (g + 1) * width)
                    seen = F.pad(value[:, mine], (size,) * 4)[:, :, size + top : 2 * size + top, size + left : 2 * size + left]
                    spot = F.one_hot(torch.tensor(i * w + j), h * w).view(h, w).to(F64)
                    found = torch.einsum("bk,bck->bc", p, seen.flatten(2))
                    out = out + F.pad(found, (mine.start, c - mine.stop))[..., None, None] * spot
    return out


@check(
    "contmix",
    "values and gradients of the windows, 6 x 9 pixels, of two sizes and pools == pixel by pixel",
    below=1e-10,
    control="windows around each pixel, zeros outside",
)
def _() -> tuple[float, float]:
    gaps, query, context, value = [], image(1, 8, 6, 9), image(1, 3, 4, 5), image(1, 8, 6, 9)
    for options in ({"kernel": 5, "small": 3, "heads": 1, "pool": 2}, {"kernel": 3, "small": 3, "heads": 2, "pool": 3}):
        layer = settled(DynamicKernels(8, 3, **options))
        leaves = (query, context, value, *layer.parameters())
        gaps.append(gap_with_gradients(layer(query, context, value), windows(layer, query, context, value), leaves))
    return max(gaps), naive.gap(layer(query, context, value), windows(layer, query, context, value, shifted=False))


@check(
    "contmix",
    "a map of ones through the windows, also of maps smaller than they: off ones",
    below=1e-12,
    control="weights before the softmax",
)
def _() -> tuple[float, float]:
    layer, gaps = settled(DynamicKernels(8, 4)), []
    for h, w in ((9, 7), (3, 5), (4, 2), (1, 1)):
        query, context, ones = torch.randn(2, 8, h, w, dtype=F64), torch.randn(2, 4, h, w, dtype=F64), torch.ones(2, 8, h, w, dtype=F64)
        gaps.append(naive.gap(layer(query, context, ones), ones))
    near, _ = layer.weights(torch.randn(1, 8, 7, 7, dtype=F64), torch.randn(1, 4, 7, 7, dtype=F64))
    return max(gaps), naive.gap(near.log().sum(-1), torch.ones_like(near[..., 0]))


def dilated(x: Tensor, layer: DilatedReparam) -> Tensor:
    return sum(  # type: ignore[return-value]
        batch_norm(depthwise(x, conv.weight, None, conv.dilation[0]), bn)  # type: ignore[arg-type, index]
        for conv, bn in zip(layer.convs, layer.norms, strict=True)
    )


@check("contmix", "kernels of 5, 7, 13 and 17 merged == their branches, and those by hand", below=1e-10, control="the large kernel alone")
def _() -> tuple[float, float]:
    gaps = []
    shapes = {5: [5, 3, 3], 7: [7, 5, 3, 3, 3], 13: [13, 5, 7, 7, 3, 3, 3], 17: [17, 5, 7, 9, 3, 3, 3]}
    steps = {5: [1, 1, 2], 7: [1, 1, 1, 2, 3], 13: [1, 1, 1, 2, 3, 4, 5], 17: [1, 1, 1, 2, 4, 5, 7]}
    for kernel, sizes in shapes.items():
        x, layer = image(2, 3, 19, 22), settled(DilatedReparam(3, kernel))
        assert [conv.weight.shape[-1] for conv in layer.convs] == sizes and [conv.dilation[0] for conv in layer.convs] == steps[kernel]  # type: ignore[index, union-attr]
        truth, alone = dilated(x, layer), batch_norm(depthwise(x, layer.convs[0].weight), layer.norms[0])  # type: ignore[arg-type]
        gaps.append(naive.gap(layer(x), truth))
        merged(layer)
        layer.merge()
        assert {name for name, _ in layer.named_parameters()} == {"merged.weight", "merged.bias"}
        gaps.append(naive.gap(layer(x), truth))
    return max(gaps), naive.gap(alone, truth)


def responded(x: Tensor, layer: Any) -> Tensor:
    size = x.square().sum((2, 3), keepdim=True).sqrt()
    return (1 + layer.gamma * size / (size.mean(1, keepdim=True) + 1e-6)) * x + layer.beta


def mlp(x: Tensor, layers: Any) -> Tensor:
    first, _, near, response, last = layers
    h = gelu(pointwise(x, first.weight, first.bias))
    return pointwise(responded(h + depthwise(h, near.weight, near.bias), response), last.weight, last.bias)


def excited(x: Tensor, layer: SqueezeExcite) -> Tensor:
    h = gelu(pointwise(x.mean((2, 3), keepdim=True), layer.first.weight, layer.first.bias))
    return x / (1 + torch.exp(-pointwise(h, layer.last.weight, layer.last.bias)))


def joined(x: Tensor, branch: Tensor, join: Residual, on_stream: bool) -> Tensor:
    s: Any = join.scale
    if isinstance(s, torch.nn.Identity):
        return x + branch
    return s.weight * x + s.bias + branch if on_stream else x + s.weight * branch + s.bias


def block(layer: ContMix, x: Tensor, context: Tensor | None, origin: Tensor | None, on_stream: bool, gated: bool = True) -> Tensor:
    layers: Any = layer
    if origin is not None and context is not None:
        context = layers.mixed.weight * context + layers.mixed.bias + layers.began.weight * origin + layers.began.bias
    z = x if context is None else torch.cat((x, context), 1)
    z = z + depthwise(z, layer.near1.weight, layer.near1.bias)
    u = norm(z, layer.norm1)
    if context is None:
        f, key, value = u, u, folded(u, layer.value)
    else:
        conv, bn, _, one, response = layers.fuse
        f = responded(pointwise(gelu(batch_norm(depthwise(u, conv.weight, conv.bias), bn)), one.weight, one.bias), response)
        key, value = u[:, layer.dim :], f
    agg = folded(windows(layer.windows, u[:, : layer.dim], key, value), layer.out)
    place = batch_norm(dilated(f, layers.place[0]), layers.place[1])
    y = excited(agg + place, layer.excite) * (silu(folded(f, layer.gate)) if gated else 1)
    bn, last = layers.last
    z = joined(z, pointwise(batch_norm(y, bn), last.weight, last.bias), layer.join1, on_stream)
    z = z + depthwise(z, layer.near2.weight, layer.near2.bias)
    return joined(z, mlp(norm(z, layer.norm2), layer.mlp), layer.join2, on_stream)


@check(
    "contmix",
    "values and gradients of ContMix as the first block, as a later one with scales on the stream and on the branch, and on x alone == by hand",
    below=1e-9,
    control="no gate",
)
def _() -> tuple[float, float]:
    gaps, x, context, origin = [], image(1, 4, 5, 6), image(1, 3, 5, 6), image(1, 3, 5, 6)
    small: dict[str, Any] = {"kernel": 5, "small": 3, "heads": 1, "pool": 2, "ratio": 2}
    cases: list[tuple[dict[str, Any], tuple[Tensor, ...]]] = [
        ({"context_dim": 3}, (x, context)),
        ({"context_dim": 3, "first": False, "scale": 0.5, "on_stream": True}, (x, context, origin)),
        ({"scale": 0.5}, (x,)),
    ]
    for options, given in cases:
        layer = settled(ContMix(4, **small, **options))
        out = layer(*given)
        found = torch.cat(out, 1) if isinstance(out, tuple) else out
        told = (*given, None, None)[:3]
        truth = block(layer, *told, bool(options.get("on_stream")))
        gaps.append(gap_with_gradients(found, truth, (*given, *layer.parameters())))
    return max(gaps), naive.gap(found, block(layer, *told, False, gated=False))


@check(
    "contmix",
    "change of an output when the context changes 20 pixels away, windows of 7",
    above=1e-6,
    control="a convolution with a kernel of 7",
)
def _() -> tuple[float, float]:
    layer, query, context = settled(DynamicKernels(8, 4)), torch.randn(1, 8, 24, 24, dtype=F64), torch.randn(1, 4, 24, 24, dtype=F64)
    other, conv = context.clone(), torch.nn.Conv2d(4, 4, 7, padding=3).to(F64)
    other[:, :, 22, 22] += 5
    near = [layer(query, y, query)[..., 2, 2] for y in (context, other)]
    return naive.gap(*near), naive.gap(conv(context)[..., 2, 2], conv(other)[..., 2, 2])


def net_by_hand(net: OverLoCK, x: Tensor, context_up: bool = True) -> tuple[Tensor, Tensor]:
    """By the blocks themselves, which the other checks hold, and RepConv blocks by hand."""
    maps, stages = [], [*net.base, net.overview]
    for at, stage in enumerate(stages):
        layers: list[Any] = list(stage)  # type: ignore[call-overload]
        convs = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
        norms = [layer for layer in layers if isinstance(layer, torch.nn.BatchNorm2d)]
        strides = (2, 1, 2, 1) if at == 0 else (2,)
        for number, (conv, bn, stride) in enumerate(zip(convs, norms, strides, strict=True)):
            x = batch_norm(F.conv2d(x, conv.weight, None, stride, 1), bn)
            x = gelu(x) if number < len(convs) - 1 else x
        for layer in layers:
            if isinstance(layer, RepConvBlock):
                parts: Any = layer.branch
                x = x + depthwise(x, layer.near.weight, layer.near.bias)
                y = excited(batch_norm(dilated(norm(x, parts[0]), parts[1]), parts[2]), parts[3])
                x = joined(x, mlp(y, parts[4:]), layer.join, on_stream=True)
        maps.append(x)
    x, overview = maps[2], maps[3]
    small = pointwise(overview, net.context.weight, net.context.bias)
    context = (
        F.interpolate(small, x.shape[2:], mode="bilinear") if context_up else torch.zeros_like(x[:, :1]) + small.mean((2, 3), keepdim=True)
    )
    origin = context
    blocks: Any = net.focus
    for number, part in enumerate(blocks[0]):
        x, context = part(x, context, *([origin] if number else []))
    downs: Any = net.downs
    (c1, n1), (c2, n2) = downs
    x, context = batch_norm(F.conv2d(x, c1.weight, None, 2, 1), n1), batch_norm(F.conv2d(context, c2.weight, None, 2, 1), n2)
    for part in blocks[1]:
        x, context = part(x, context, small)
    heads: Any = (net.head, net.aux)
    (conv, bn, _, _, _, last), (aux_bn, _, _, aux) = heads
    pooled = silu(batch_norm(pointwise(torch.cat((x, context), 1), conv.weight), bn)).mean((2, 3))
    return pooled @ last.weight.T + last.bias, batch_norm(overview, aux_bn).mean((2, 3)) @ aux.weight.T + aux.bias


@check(
    "contmix",
    "OverLoCK's logits and auxiliary logits == its blocks wired by hand, 66 x 90 pixels",
    below=1e-9,
    control="the overview's mean as context",
)
def _() -> tuple[float, float]:
    net = settled(
        OverLoCK((8, 4, 8, 8), (1, 2, 1, 1), (2, 2), (1, 1), (7, 5, 7, 5), 3, (2, 3, 2, 2), (2, 1), channels=2, classes=3, projection=6)
    )
    x = torch.randn(2, 2, 66, 90, dtype=F64)
    with torch.no_grad():
        (found, aux), (truth, aux_truth) = net.both(x), net_by_hand(net, x)
        return max(naive.gap(found, truth), naive.gap(aux, aux_truth), naive.gap(net(x), truth)), naive.gap(
            found, net_by_hand(net, x, False)[0]
        )


@check("contmix", "parameters of OverLoCK-T, over 34,990,472", below=0.0, control="OverLoCK-T without its focus net's first stage")
def _() -> tuple[float, float]:
    def off(**options: Any) -> float:
        with torch.device("meta"):
            return abs(sum(p.numel() for p in overlock("t", **options).parameters()) - 34_990_472.0)

    return off(), off(focus=(0, 2))


@check(
    "contmix",
    "OverLoCK-T at 224 x 224 over ConvNeXt-B: products, and parameters",
    below=0.42,
    control="OverLoCK-S",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    def size(make: Callable[[], torch.nn.Module]) -> tuple[float, float]:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = make().eval()
            net(torch.randn(1, 3, 224, 224))
        return float(counter.get_total_flops()), float(sum(p.numel() for p in net.parameters()))

    convnext = timm_host.load("timm").models.convnext.ConvNeXt
    base = size(lambda: convnext(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)))
    own, larger = ([a / b for a, b in zip(size(lambda kind=kind: overlock(kind)), base, strict=True)] for kind in "ts")  # type: ignore[misc]
    return max(own), min(larger)


@check("contmix", "accuracy of telling squares from discs, a small OverLoCK after 240 steps", above=0.75, control="before them")
def _() -> tuple[float, float]:
    def make() -> OverLoCK:
        return OverLoCK((8, 8, 16, 16), (1, 1, 1, 1), (1, 1), (1, 1), (5, 5, 5, 5), 3, (2,) * 4, (2, 2), classes=2, projection=16)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, (_, kinds) = scenes(count, generator, most=1)
        return x, kinds[:, 0]

    return accuracy(trained(make, draw, 240, lr=1e-2, batch=16), draw, 400), accuracy(make().eval(), draw, 400)
