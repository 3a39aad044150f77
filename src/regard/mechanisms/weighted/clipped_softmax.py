"""Clipped softmax and gated attention: heads that can do nothing without outliers (id 102; Bondarenko et al., 2023).

p_ij = clip((zeta - gamma) softmax(s_i)_j + gamma, 0, 1),   gamma = -alpha / T        gated: o_h times sigmoid(G_h(x))
"""

import torch
from torch import Tensor

from ...algebra import Input, Learned, Recipe, RowWise, Sizes, Weighted, bind, row_softmax
from ...algebra.normalizer import SOFTMAX
from ...catalog.registry import register
from ...errors import RegardError


def clipped(s: Tensor, seen: Tensor, gamma: Tensor, zeta: float) -> Tensor:
    return ((zeta - gamma) * row_softmax(s, seen) + gamma).clamp(0, 1)


def minus_over_length(sizes: Sizes, alpha: float) -> Tensor:
    return torch.tensor(-alpha / sizes.k_len)


@register("clipped-softmax")
def clipped_softmax(
    alpha: float = 4.0, gamma: float | None = None, zeta: float = 1.0, out_gate: str = "", gate_init: float = 0.5
) -> Weighted:
    """gamma: a fixed number <= 0, or None for -alpha / T: T is the layer's context_len, or the call's number of keys; the input `gamma`
    replaces it. zeta >= 1. out_gate: "head", "head_mlp" or "heads" adds the gates; with gamma = 0 the weights are plain softmax."""
    if (gamma is not None and gamma > 0) or zeta < 1 or alpha < 0:
        raise RegardError(f"gamma={gamma}, zeta={zeta}, alpha={alpha}: expected gamma <= 0, zeta >= 1, alpha >= 0")
    recipe = Recipe(out_gate=out_gate, gate_init=gate_init)
    if gamma == 0 and zeta == 1:
        return Weighted(normalizer=SOFTMAX, recipe=recipe)
    start = bind(minus_over_length, alpha=alpha) if gamma is None else gamma
    inputs = (Input("gamma", default=start, layer=Learned(start, trainable=False)),)
    return Weighted(normalizer=RowWise(bind(clipped, zeta=zeta), inputs), recipe=recipe)
