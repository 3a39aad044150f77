"""Checks of litv2-hilo."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import flops, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import batch_norm, depthwise, gelu, image, layer_norm, pointwise, settled
from regard.lab.checks.shared.token_attention import attended, same_window
from regard.lab.verification import check
from regard.zoo.vision.litv2_hilo import DeformableMerging, HiLo, LITBlock, LITv2


def hilo(layer: HiLo, x: Tensor, height: int, width: int, low_first: bool = False) -> Tensor:
    """Both groups of heads over a map filled up with zeros, windows by a mask, means by loops."""
    s = layer.window
    h, w = height + -height % s, width + -width % s
    plane = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, w - width, 0, h - height))
    flat, parts = plane.flatten(1, 2), []
    if layer.high is not None:
        parts.append(attended(layer.high, flat, None, same_window(h, w, s)))
    if layer.low is not None:
        means = torch.stack([plane[:, i : i + s, j : j + s].mean((1, 2)) for i in range(0, h, s) for j in range(0, w, s)], 1)
        parts.append(attended(layer.low, flat, means))
    out = torch.cat(parts[::-1] if low_first else parts, -1).unflatten(1, (h, w))
    return out[:, :height, :width].flatten(1, 2)


@check(
    "litv2-hilo",
    "values and gradients: 3 of 4 heads low, none, all; windows of 1, 2, 3 that do and do not fit; a scale and biases == a mask and means by loops",
    below=1e-11,
    control="low heads first",
)
def _() -> tuple[float, float]:
    gaps, other = [], 0.0
    for shape, window, alpha, options in (
        ((4, 6), 2, 0.75, {}),
        ((5, 7), 3, 0.5, {"qkv_bias": True, "scale": 0.3}),
        ((4, 4), 2, 0.0, {}),
        ((3, 5), 2, 1.0, {}),
        ((3, 4), 1, 0.5, {}),
    ):
        layer, x = drawn(HiLo(8, 4, window, alpha, **options)), image(2, shape[0] * shape[1], 8)
        gaps.append(gap_with_gradients(layer(x, shape), hilo(layer, x, *shape), (x, *layer.parameters())))
        if alpha == 0.75:
            assert layer.widths == (2, 6)
            other = naive.gap(layer(x, shape), hilo(layer, x, *shape, low_first=True))
    return max(gaps), other


@check("litv2-hilo", "what a change of one window's token changes in high heads of another window", below=0.0, control="low heads")
def _() -> tuple[float, float]:
    layer, x = HiLo(8, 4), torch.randn(1, 16, 8)
    y = x.clone()
    y[0, 0] += 1
    far = (layer(x) - layer(y)).detach()[0, 10].abs()
    return float(far[:4].max()), float(far[4:].max())


@check(
    "litv2-hilo",
    "products that the layer says it needs, off those of its projections as run and two a visible pair and channel",
    below=0.0,
    control="as many heads low as high",
)
def _() -> tuple[float, float]:
    layer = HiLo(8, 4, 2, 0.75)
    run = flops(lambda: layer(torch.randn(1, 35, 8), (5, 7))) // 2  # of the projections; the kernel of attention is not counted
    high, low = layer.widths
    pairs = 2 * high * int(same_window(6, 8, 2).sum()) + 2 * low * 48 * 12
    return float(abs(layer.flops(5, 7) - run - pairs)), float(abs(HiLo(8, 4).flops(5, 7) - run - pairs))


def block_by_hand(x: Tensor, block: LITBlock) -> Tensor:
    def normed(y: Tensor, norm: Any) -> Tensor:
        return layer_norm(y.movedim(1, -1), norm.norm).movedim(-1, 1)

    if block.attention is not None:
        h, w = x.shape[2:]
        x = x + hilo(block.attention, normed(x, block.norm1).flatten(2).mT, h, w).mT.unflatten(-1, (h, w))
    parts: list[Any] = list(block.mlp.children())
    y = gelu(depthwise(pointwise(normed(x, block.norm2), parts[0].weight, parts[0].bias), parts[1].weight, parts[1].bias))
    return x + pointwise(y, parts[4].weight, parts[4].bias)


def merged(x: Tensor, layer: DeformableMerging) -> Tensor:
    """Each tap where the second convolution moves it, by the four pixels around."""
    moves = F.conv2d(x, layer.move.weight, layer.move.bias, 2)
    (h, w), weight = x.shape[2:], layer.conv.weight
    out = layer.conv.bias[:, None, None].expand(len(x), -1, h // 2, w // 2).clone()  # type: ignore[index]
    for b in range(len(x)):
        for i in range(h // 2):
            for j in range(w // 2):
                for tap in range(4):
                    row = 2 * i + tap // 2 + moves[b, 2 * tap, i, j]
                    column = 2 * j + tap % 2 + moves[b, 2 * tap + 1, i, j]
                    value = torch.zeros(x.shape[1], dtype=x.dtype)
                    for r in (row.floor(), row.floor() + 1):
                        for c in (column.floor(), column.floor() + 1):
                            if 0 <= r < h and 0 <= c < w:
                                value = value + (1 - (row - r).abs()) * (1 - (column - c).abs()) * x[b, :, int(r), int(c)]
                    out[b, :, i, j] += weight[:, :, tap // 2, tap % 2] @ value
    return gelu(batch_norm(out, layer.norm))


@check(
    "litv2-hilo",
    "deformable merging, values and gradients == pixel by pixel; the whole net with stages of the MLP alone, of windows and of plain attention",
    below=1e-9,
    control="merging by fixed taps",
)
def _() -> tuple[float, float]:
    layer, x = settled(DeformableMerging(3, 4)), image(2, 3, 5, 6)
    gaps = [gap_with_gradients(layer(x), merged(x, layer), (x, *layer.parameters()))]
    fixed = gelu(batch_norm(F.conv2d(x, layer.conv.weight, layer.conv.bias, 2), layer.norm))
    net, y = settled(LITv2(4, (1, 2, 1), (1, 2, 4), (0, 2, 1), 0.5, channels=2, classes=3, patch=2, ratio=2.0)), image(2, 2, 24, 20)
    parts: list[Any] = list(net.layers)
    z = F.conv2d(y, parts[0].weight, parts[0].bias, 2)
    z = layer_norm(z.movedim(1, -1), parts[1].norm).movedim(-1, 1)
    for part in parts[2:]:
        z = block_by_hand(z, part) if isinstance(part, LITBlock) else merged(z, part)
    gaps.append(naive.gap(net(y), layer_norm(z.movedim(1, -1), net.norm.norm).mean((1, 2)) @ net.head.weight.T + net.head.bias))
    return max(gaps), naive.gap(layer(x), fixed)


@check(
    "litv2-hilo",
    "time of HiLo (alpha 0.9) over attention of all tokens in one layer, 56 x 56 tokens of 128 channels, 4 heads (least of 3)",
    below=0.5,
    control="windows of one token",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x = torch.randn(1, 56 * 56, 128)

    def seconds(layer: HiLo) -> float:
        found = []
        for _ in range(4):
            start = time.perf_counter()
            layer(x)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    whole = seconds(HiLo(128, 4, 1))
    return seconds(HiLo(128, 4, 2, 0.9)) / whole, seconds(HiLo(128, 4, 1)) / whole
