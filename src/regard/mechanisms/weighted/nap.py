"""Normalized attention without the probability cage: standardised logits as weights (id 2; Richter & Wattenhofer, 2020).

p_ij = g_h (s_ij - mean_j s_i) / (std_j s_i + eps) + b_h,   s_ij = q_i.k_j        weights may be negative; a row sums to n_i b_h
"""

import torch
from torch import Tensor

from ...algebra import Dot, Input, Learned, Recipe, RowLocal, RowWise, Weighted, bind, identity, row_mean
from ...catalog.registry import register
from ...errors import RegardError


def standardised(s: Tensor, seen: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    away = s - row_mean(s, seen)
    variance = row_mean(away.square(), seen)
    spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)  # no infinite slope at 0
    return gain * away / (spread + eps) + shift


def root_visible(total: Tensor, n: Tensor) -> Tensor:
    return n.clamp_min(1).sqrt()


@register("nap")
def nap(eps: float = 1e-3, variant: str = "nap") -> Weighted:
    """Inputs `gain` and `shift`, one a head, start at 1 and 0. The layer puts LayerNorm and GELU between heads and projection.

    variant: "nap"; or the paper's comparisons "non" (raw logits, output / sqrt(n_i)) and "mte" (softmax, then LayerNorm and GELU).
    """
    block = Recipe(merge_norm="layer", merge_activation="gelu")
    if variant == "nap":
        inputs = (Input("gain", "h", default=1.0, layer=Learned(1.0)), Input("shift", "h", default=0.0, layer=Learned(0.0)))
        return Weighted(score=Dot(power=0.0), normalizer=RowWise(bind(standardised, eps=eps), inputs), recipe=block)
    if variant == "non":
        return Weighted(score=Dot(power=0.0), normalizer=RowLocal(identity, divide=root_visible), recipe=Recipe(merge_activation="gelu"))
    if variant == "mte":
        return Weighted(recipe=block)
    raise RegardError(f"variant={variant!r}; expected nap, non or mte")
