"""Checks of polarized-attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
from regard.lab.checks.shared.planes import image, layer_norm, pointwise, settled
from regard.lab.checks.shared.training import error, middle, trained
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.nn.images.slot_net import Slot, SlotNet
from regard.tasks.images import cued_bumps
from regard.zoo.vision.polarized_attention import PolarizedSelfAttention


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    e = x.exp()
    return e / e.sum(dim, keepdim=True)


def of_channels(layer: PolarizedSelfAttention, x: Tensor, *, sequential: bool, released: bool) -> Tensor:
    weights = softmax(pointwise(x, layer.q_plane.weight).flatten(1))
    z = (pointwise(x, layer.v_plane.weight).flatten(2) * weights[:, None]).sum(-1)
    up = layer.up
    if released and sequential:
        assert isinstance(up, nn.Sequential)
        h = layer_norm(z @ up[0].weight.T + up[0].bias, up[1]).clamp_min(0)  # type: ignore[operator]
        z = h @ up[3].weight.T + up[3].bias  # type: ignore[operator]
    else:
        z = z @ up.weight.T  # type: ignore[operator]
    z = z if released else layer_norm(z, layer.norm)
    return 1 / (1 + torch.exp(-z))[..., None, None]


def of_pixels(layer: PolarizedSelfAttention, x: Tensor, *, sequential: bool, released: bool) -> Tensor:
    query = pointwise(x, layer.q_channel.weight).mean((2, 3))
    values = pointwise(x, layer.v_channel.weight).flatten(2)
    if not released:
        s = (softmax(query)[..., None] * values).sum(1)
    elif sequential:
        s = (query[..., None] * softmax(values)).sum(1)
    else:
        s = softmax((query[..., None] * values).sum(1))
    return 1 / (1 + torch.exp(-s)).view(len(x), 1, *x.shape[2:])


def by_hand(layer: PolarizedSelfAttention, x: Tensor, sequential: bool, released: bool) -> Tensor:
    first = x * of_channels(layer, x, sequential=sequential, released=released)
    second = first if sequential else x
    gated = second * of_pixels(layer, second, sequential=sequential, released=released)
    return gated if sequential else gated + first


@check(
    "polarized-attention",
    "values and gradients in both layouts, the paper's forms and the released ones, of odd sizes == by hand",
    below=1e-11,
    control="the other layout",
)
def _() -> tuple[float, float]:
    gaps, other = [], math.inf
    for released in (False, True):
        for sequential in (False, True):
            layer, x = settled(PolarizedSelfAttention(16, "sequential" if sequential else "parallel", released)), image(2, 16, 5, 7)
            gaps.append(gap_with_gradients(layer(x), by_hand(layer, x, sequential, released), (x, *layer.parameters())))
            if not released:
                other = min(other, naive.gap(layer(x), by_hand(layer, x, not sequential, released)))
    return max(gaps), other


@check(
    "polarized-attention",
    "how far the released parallel gate of pixels leaves (1/2, e / (1 + e)), of large inputs",
    below=0.0,
    control="the paper's gate",
)
def _() -> tuple[float, float]:
    x = 20 * image(2, 16, 6, 6)

    def outside(released: bool) -> float:
        gate = settled(PolarizedSelfAttention(16, released=released)).over_pixels(x)
        return float(torch.maximum(0.5 - gate, gate - math.e / (1 + math.e)).max().clamp_min(0))

    return outside(True), outside(False)


@check("polarized-attention", "largest tensor at 64 x 64 and 8 channels, over (HW)^2", below=0.01, control="attention of pixels to pixels")
@torch.no_grad()
def _() -> tuple[float, float]:
    x, layer = torch.randn(1, 8, 64, 64), PolarizedSelfAttention(8)
    flat = x.flatten(2)
    return largest_tensor(lambda: layer(x)) / 4096**2, largest_tensor(lambda: flat @ (flat.mT @ flat).softmax(-1)) / 4096**2


@check(
    "polarized-attention",
    "error of heat maps of the bump that a cue far away names, over their variance, gate in a one-block net (median of 3 seeds)",
    below=0.25,
    control="no gate",
)
def _() -> tuple[float, float]:
    targets = cued_bumps(200, torch.Generator().manual_seed(1))[1]

    def left(slot: Slot | None) -> float:
        def run(seed: int) -> float:
            net = trained(lambda: SlotNet(2, 1, slot, (16,), dense=True), cued_bumps, 100, seed=seed, lr=1e-2, batch=32, loss=F.mse_loss)
            return error(net, cued_bumps) / float(targets.var())

        return middle(run)

    return left(PolarizedSelfAttention), left(None)
