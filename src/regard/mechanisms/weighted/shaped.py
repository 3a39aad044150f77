"""Shaped attention: centred at the identity, with a temperature that grows with width (id 65; Noci et al., 2023).

A = I + softmax(Y / (tau0 sqrt(width))) - 1/m 11^T,   Y = q.k / sqrt(D)        under a mask 1/m is 1 / n_i on the visible keys
"""

import torch
from torch import Tensor

from ...algebra import Dot, RowWise, Weighted, bind, row_count, row_softmax
from ...catalog.registry import register
from ...errors import RegardError


def shaped(s: Tensor, seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i == j).to(s.dtype) + row_softmax(s, seen) - 1 / row_count(seen, s)


def cooled(n: Tensor, factor: float) -> Tensor:
    return torch.full_like(n, factor)


@register("shaped-transformer")
def shaped_attention(width: int = 128, tau0: float = 1.0) -> Weighted:
    """width: channels of the model, whose square root the logits are divided by once more. The layer's residual branch should be weighted:
    lambda x + gamma A x W with lambda^2 + gamma^2 = 1 (`regard.lab.experiments.shaped`)."""
    if width < 1 or tau0 <= 0:
        raise RegardError(f"width={width}, tau0={tau0}: expected positive numbers")
    return Weighted(score=Dot(bind(cooled, factor=1 / (tau0 * width**0.5))), normalizer=RowWise(shaped))
