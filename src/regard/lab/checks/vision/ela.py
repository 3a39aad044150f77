"""Checks of ela."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
from regard.lab.checks.shared.global_gates import sign_accuracy
from regard.lab.checks.shared.planes import batch_norm, image, pointwise, settled
from regard.lab.verification import check
from regard.zoo.vision.ela import ELA, CoordinateAttention


def strip_gate(layer: ELA, z: Tensor, group: int, norm_groups: int, norm: nn.GroupNorm | None = None) -> Tensor:
    """sigmoid(GN(conv1d(z))), z (B, C, L), output by output."""
    weight, norm = layer.conv.weight, norm or layer.norm
    b, c, length = z.shape
    k = weight.shape[-1]
    wide = torch.nn.functional.pad(z, (k // 2, k // 2))
    rows = []
    for o in range(c):
        start = o // group * group
        rows.append(torch.stack([(weight[o] * wide[:, start : start + group, i : i + k]).sum((1, 2)) for i in range(length)], -1))
    y = torch.stack(rows, 1).view(b, norm_groups, -1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y.view(b, c, length) * norm.weight[:, None] + norm.bias[:, None]
    return 1 / (1 + torch.exp(-y))


@check(
    "ela",
    "values and gradients of T, B, S and L, of odd sizes, one image: x times a row gate times a column gate == by hand",
    below=1e-12,
    control="a norm of its own for columns",
)
def _() -> tuple[float, float]:
    gaps, other = [], 0.0
    for variant, channels, k, group, norm_groups in (("T", 32, 5, 1, 32), ("B", 16, 7, 1, 16), ("S", 16, 5, 8, 16), ("L", 32, 7, 8, 16)):
        layer, x = settled(ELA(channels, variant)), image(1, channels, 5, 8)
        assert layer.conv.weight.shape == (channels, group, k) and layer.norm.num_groups == norm_groups
        rows, columns = strip_gate(layer, x.sum(3) / 8, group, norm_groups), strip_gate(layer, x.sum(2) / 5, group, norm_groups)
        gaps.append(gap_with_gradients(layer(x), x * rows[..., None] * columns[:, :, None], (x, *layer.parameters())))
        found = layer.strips(x)
        gaps += [naive.gap(found[0], rows[..., None]), naive.gap(found[1], columns[:, :, None])]
        own = settled(nn.GroupNorm(norm_groups, channels))
        other = naive.gap(layer(x), x * rows[..., None] * strip_gate(layer, x.sum(2) / 5, group, norm_groups, own)[:, :, None])
    return max(gaps), other


def second_singular(layer: nn.Module, x: Tensor) -> float:
    s = torch.linalg.svdvals(layer(x) / x)
    return float((s[..., 1] / s[..., 0]).max())


@check(
    "ela", "what other images of a training batch change in the first output", below=0.0, control="coordinate attention, with its BatchNorm"
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 32, 6, 9)
    y = torch.cat((x[:1], torch.randn(3, 32, 6, 9)))
    return tuple(naive.gap(layer(x)[0], layer(y)[0]) for layer in (ELA(32), CoordinateAttention(32)))  # type: ignore[return-value]


@check("ela", "second over first singular value of a channel's gains", below=1e-10, control="a gate of pixels")
def _() -> tuple[float, float]:
    from regard.nn.images.plane_gates import SpatialGate

    x = image(2, 16, 7, 10)
    return second_singular(settled(ELA(16)), x), second_singular(settled(SpatialGate()), x)


@check(
    "ela",
    "coordinate attention, values and gradients == by hand: both strips through one 1 x 1 convolution, BatchNorm, h-swish",
    below=1e-12,
    control="ReLU in place of h-swish",
)
def _() -> tuple[float, float]:
    layer, x = settled(CoordinateAttention(16, reduction=2)), image(2, 16, 5, 8)
    conv, norm, _ = layer.squeeze
    assert isinstance(conv, nn.Conv2d) and conv.out_channels == 8

    def by_hand(swish: bool) -> Tensor:
        gates = []
        for z, last in ((x.mean(3)[..., None], layer.rows), (x.mean(2)[..., None], layer.columns)):
            h = batch_norm(pointwise(z, conv.weight, conv.bias), norm)  # type: ignore[arg-type]
            h = h * (h + 3).clamp(0, 6) / 6 if swish else h.clamp_min(0)
            gates.append(1 / (1 + torch.exp(-pointwise(h, last.weight, last.bias))))
        return x * gates[0] * gates[1].mT

    return gap_with_gradients(layer(x), by_hand(True), (x, *layer.parameters())), naive.gap(layer(x), by_hand(False))


@check("ela", "accuracy of comparing two signs far apart, gate in a one-block net (median of 3 seeds)", above=0.9, control="no gate")
def _() -> tuple[float, float]:
    return sign_accuracy(lambda width: ELA(width, norm_groups=4)), sign_accuracy(None)
