"""Checks of cbam."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.global_gates import sign_accuracy
from regard.lab.checks.shared.planes import batch_norm, image, settled
from regard.lab.verification import check
from regard.zoo.vision.cbam import CBAM


def squeezed(values: Tensor, pool: str) -> Tensor:
    """Over the last dimension."""
    if pool == "avg":
        return values.sum(-1) / values.shape[-1]
    if pool == "max":
        return values.sort(-1).values[..., -1]
    return values.square().sum(-1).sqrt() if pool == "lp" else values.exp().sum(-1).log()


def channel_gate(layer: CBAM, x: Tensor, pools: tuple[str, ...]) -> Tensor:
    first, _, last = layer.over_channels.mlp
    logits: Tensor = torch.zeros(x.shape[:2], dtype=F64)
    for pool in pools:
        h = squeezed(x.flatten(2), pool) @ first.weight.T + first.bias  # type: ignore[operator]
        logits = logits + torch.where(h > 0, h, 0.0) @ last.weight.T + last.bias  # type: ignore[operator]
    return 1 / (1 + torch.exp(-logits))[..., None, None]


def pixel_gate(layer: CBAM, x: Tensor, pools: tuple[str, ...], norm: bool) -> Tensor:
    assert layer.over_pixels is not None
    weight = layer.over_pixels.conv.weight
    k, (h, w) = weight.shape[-1], x.shape[2:]
    maps = torch.stack([squeezed(x.movedim(1, -1), pool) for pool in pools], 1)
    wide = torch.nn.functional.pad(maps, (k // 2,) * 4)
    out = torch.stack(
        [torch.stack([(weight[0] * wide[:, :, i : i + k, j : j + k]).sum((1, 2, 3)) for j in range(w)], -1) for i in range(h)], 1
    )
    out = out[:, None]
    return 1 / (1 + torch.exp(-(batch_norm(out, layer.over_pixels.norm) if norm else out)))


@check(
    "cbam",
    "values and gradients of both gates, in three orders, with four pools, with and without the norm, and of the channel gate alone == by hand",
    below=1e-12,
    control="pixels first where channels come first",
)
def _() -> tuple[float, float]:
    gaps, x = [], image(2, 8, 5, 9)
    for order, pools, over, norm, kernel in (
        ("channel-first", ("avg", "max"), ("max", "avg"), True, 7),
        ("spatial-first", ("lp",), ("max", "avg"), False, 3),
        ("parallel", ("lse", "avg"), ("avg", "lp", "lse"), True, 7),
    ):
        layer = settled(CBAM(8, 4, pools, order=order, kernel=kernel, spatial_pools=over, norm=norm))
        c, p = (lambda y: channel_gate(layer, y, pools)), (lambda y: pixel_gate(layer, y, over, norm))  # noqa: B023
        if order == "parallel":
            truth = x * c(x) * p(x)
        else:
            first, second = (c, p) if order == "channel-first" else (p, c)
            truth = x * first(x)
            truth = truth * second(truth)
        gaps.append(gap_with_gradients(layer(x), truth, (x, *layer.parameters())))
    alone = settled(CBAM(8, 2, spatial=False))
    gaps.append(gap_with_gradients(alone(x), x * channel_gate(alone, x, ("avg", "max")), (x, *alone.parameters())))
    layer = settled(CBAM(8, 4))
    y = x * pixel_gate(layer, x, ("max", "avg"), True)
    return max(gaps), naive.gap(layer(x), y * channel_gate(layer, y, ("avg", "max")))


@check("cbam", "accuracy of comparing two signs far apart, gate in a one-block net (median of 3 seeds)", above=0.95, control="no gate")
def _() -> tuple[float, float]:
    return sign_accuracy(lambda width: CBAM(width, 4)), sign_accuracy(None)
