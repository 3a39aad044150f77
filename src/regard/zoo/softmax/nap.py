"""Normalized attention without the probability cage: standardised logits as weights (id 2; Richter & Wattenhofer, 2020).

p_ij = g_h (s_ij - mean_j s_i) / (std_j s_i + eps) + b_h,   s_ij = q_i.k_j        weights may be negative; a row sums to n_i b_h
"""

import torch
from torch import Tensor

from regard.algebra import Dot, Input, Learned, Recipe, RowLocal, RowWise, Weighted, bind, identity, row_mean
from regard.catalog.registry import register
from regard.errors import RegardError


def standardised(s: Tensor, seen: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    away = s - row_mean(s, seen)
    variance = row_mean(away.square(), seen)
    spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)  # no infinite slope at 0
    return gain * away / (spread + eps) + shift


def root_visible(total: Tensor, n: Tensor) -> Tensor:
    return n.clamp_min(1).sqrt()


def root_of(total: Tensor, length: float) -> Tensor:
    return torch.full_like(total, length**0.5)


@register("nap")
def nap(
    eps: float = 1e-3, variant: str = "nap", activation: str = "gelu_tanh", norm_eps: float = 1e-3, length: int | None = None
) -> Weighted:
    """Inputs `gain` and `shift`, one a head, start at 1 and 0. The layer puts LayerNorm (norm_eps) and GELU ("gelu_tanh", or "gelu" by erf as
    the released graph code, whose eps is 0 and norm_eps 1e-5) between heads and projection.

    variant: "nap"; or the paper's comparisons "non" (scores q.k / sqrt(D), output / sqrt(n_i), n_i the visible keys, or `length` for all
    rows, as released: that of the padded batch) and "mte" (softmax, then LayerNorm and GELU).
    """
    block = Recipe(merge_norm="layer", norm_eps=norm_eps, merge_activation=activation)
    if variant == "nap":
        inputs = (Input("gain", "h", default=1.0, layer=Learned(1.0)), Input("shift", "h", default=0.0, layer=Learned(0.0)))
        return Weighted(score=Dot(power=0.0), normalizer=RowWise(bind(standardised, eps=eps), inputs), recipe=block)
    if variant == "non":
        divide = root_visible if length is None else bind(root_of, length=float(length))
        return Weighted(normalizer=RowLocal(identity, divide=divide), recipe=Recipe(merge_activation=activation))
    if variant == "mte":
        return Weighted(recipe=block)
    raise RegardError(f"variant={variant!r}; expected nap, non or mte")
