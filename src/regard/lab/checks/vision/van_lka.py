"""Checks of van-lka."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.global_gates import sign_accuracy
from regard.lab.checks.shared.planes import batch_norm, depthwise, gelu, image, layer_norm, pointwise, settled
from regard.lab.verification import check
from regard.nn.images.patch_net import ConvMLP
from regard.zoo.vision.van_lka import LKA, VAN, LKAAttention, VANBlock


def map_of(x: Tensor, layer: LKA, dilation: int) -> Tensor:
    x = depthwise(depthwise(x, layer.near.weight, layer.near.bias), layer.far.weight, layer.far.bias, dilation)
    return pointwise(x, layer.mix.weight, layer.mix.bias)


def unit(x: Tensor, layer: LKAAttention, dilation: int) -> Tensor:
    h = gelu(pointwise(x, layer.first.weight, layer.first.bias))
    return x + pointwise(h * map_of(h, layer.attention, dilation), layer.last.weight, layer.last.bias)


def mlp(x: Tensor, layer: ConvMLP) -> Tensor:
    first, local, _, _, last, _ = layer
    h = gelu(depthwise(pointwise(x, first.weight, first.bias), local.weight, local.bias))  # type: ignore[arg-type]
    return pointwise(h, last.weight, last.bias)  # type: ignore[arg-type]


def block_by_hand(x: Tensor, block: VANBlock, dilation: int) -> Tensor:
    x = x + block.scale1[:, None, None] * unit(batch_norm(x, block.norm1), block.attention, dilation)
    return x + block.scale2[:, None, None] * mlp(batch_norm(x, block.norm2), block.mlp)


@check(
    "van-lka",
    "values and gradients of LKA of two sizes, of its unit and of a block, odd sizes == sums over taps",
    below=1e-11,
    control="a sigmoid over the map",
)
def _() -> tuple[float, float]:
    gaps, x = [], image(1, 4, 9, 11)
    for kernel, dilation, shapes in ((21, 3, (5, 7)), (9, 2, (3, 5))):
        layer = settled(LKA(4, kernel, dilation))
        assert (layer.near.weight.shape[-1], layer.far.weight.shape[-1]) == shapes
        gaps.append(gap_with_gradients(layer(x), x * map_of(x, layer, dilation), (x, *layer.parameters())))
        attention, block = settled(LKAAttention(4, kernel, dilation)), settled(VANBlock(4, 2.0, kernel, dilation))
        gaps.append(gap_with_gradients(attention(x), unit(x, attention, dilation), (x, *attention.parameters())))
        gaps.append(gap_with_gradients(block(x), block_by_hand(x, block, dilation), (x, *block.parameters())))
    return max(gaps), naive.gap(layer(x), x * map_of(x, layer, dilation).sigmoid())


@check(
    "van-lka", "the net's stages and logits == by hand, two stages, 23 x 30 pixels", below=1e-10, control="no norm at the ends of stages"
)
def _() -> tuple[float, float]:
    net, x = settled(VAN((4, 6), (1, 2), (2, 3), channels=2, classes=3)), image(2, 2, 23, 30)

    def by_hand(normed: bool) -> Tensor:
        y = x
        for stage, stride, reach in zip(net.stages, (4, 2), (3, 1), strict=True):
            parts: list[Any] = list(stage.children())
            conv, first, blocks, last = parts[0], parts[1], parts[2:-1], parts[-1]
            y = batch_norm(torch.nn.functional.conv2d(y, conv.weight, conv.bias, stride, reach), first)
            for block in blocks:
                y = block_by_hand(y, block, 3)
            y = layer_norm(y.movedim(1, -1), last.norm, 1e-6).movedim(-1, 1) if normed else y
        return y.mean((2, 3)) @ net.head.weight.T + net.head.bias

    return naive.gap(net(x), by_hand(True)), naive.gap(net(x), by_hand(False))


@check("van-lka", "pixels outside 23 x 23 that an impulse reaches, of those that the map has inside", below=0.0, control="a 25 x 25 kernel")
def _() -> tuple[float, float]:
    def outside(kernel: int) -> float:
        layer = LKA(1, kernel).to(F64)
        for p in layer.parameters():
            p.data.fill_(1.0 if p.dim() > 1 else 0.0)
        x = torch.zeros(1, 1, 41, 41, dtype=F64)
        x[..., 20, 20] = 1
        seen = layer.gate(x)[0, 0] > 0
        assert kernel != 21 or bool(seen[9:32, 9:32].all())
        return float(seen.sum() - seen[9:32, 9:32].sum())

    return outside(21), outside(25)


@check("van-lka", "LKA(2x) = 4 LKA(x) without biases: largest difference", below=1e-12, control="a sigmoid over the map")
def _() -> tuple[float, float]:
    layer, x = settled(LKA(4)), image(1, 4, 9, 9)
    for part in (layer.near, layer.far, layer.mix):
        torch.nn.init.zeros_(part.bias)  # type: ignore[arg-type]
    return naive.gap(layer(2 * x), 4 * layer(x)), naive.gap(2 * x * layer.gate(2 * x).sigmoid(), 4 * x * layer.gate(x).sigmoid())


@check("van-lka", "accuracy of comparing two signs far apart, LKA in a one-block net (median of 3 seeds)", above=0.9, control="no gate")
def _() -> tuple[float, float]:
    return sign_accuracy(LKA), sign_accuracy(None)
