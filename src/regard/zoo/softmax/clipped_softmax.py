"""Clipped softmax and gated attention: heads that can do nothing without outliers (id 102; Bondarenko et al., 2023).

p_ij = clip((zeta - gamma) softmax(s_i)_j + gamma, 0, 1),   gamma = -alpha / T        gated: o_h times sigmoid(G_h(x))

Rounded weights and activations (W8A8): `regard.lab.quantisation.quantised_throughout`. In the tiny copying task clipping narrows the range of logits; gating does not.
"""

import torch
from torch import Tensor

from regard.algebra import Input, Learned, Recipe, RowWise, Sizes, Weighted, bind, row_softmax
from regard.algebra.normalizer import SOFTMAX
from regard.catalog.registry import register
from regard.errors import RegardError


def clipped(s: Tensor, seen: Tensor, gamma: Tensor, zeta: float) -> Tensor:
    return ((zeta - gamma) * row_softmax(s, seen) + gamma).clamp(0, 1)


def minus_over_length(sizes: Sizes, alpha: float) -> Tensor:
    return torch.tensor(-alpha / sizes.k_len, dtype=torch.float64)


@register("clipped-softmax")
def clipped_softmax(
    alpha: float = 4.0,
    gamma: float | None = None,
    zeta: float = 1.0,
    out_gate: str = "",
    gate_init: float = 0.5,
    gate_factor: float = 1.0,
    gate_hidden: int | None = None,
) -> Weighted:
    """gamma: a fixed number <= 0, or None for -alpha / T: T is the layer's context_len, or the call's number of keys; the input `gamma`
    replaces it. zeta >= 1. out_gate adds the gates of `regard.nn.parts.HeadGate`: "head", "head_mlp" (gate_hidden wide inside), "heads", "mean" or
    "constant", starting at gate_init, times gate_factor (1 / gate_init in fine-tuning); with gamma = 0 the weights are plain softmax."""
    if (gamma is not None and gamma > 0) or zeta < 1 or alpha < 0:
        raise RegardError(f"gamma={gamma}, zeta={zeta}, alpha={alpha}: expected gamma <= 0, zeta >= 1, alpha >= 0")
    recipe = Recipe(out_gate=out_gate, gate_init=gate_init, gate_factor=gate_factor, gate_hidden=gate_hidden)
    if gamma == 0 and zeta == 1:
        return Weighted(normalizer=SOFTMAX, recipe=recipe)
    start = bind(minus_over_length, alpha=alpha) if gamma is None else gamma
    inputs = (Input("gamma", default=start, layer=Learned(start, trainable=False)),)
    return Weighted(normalizer=RowWise(bind(clipped, zeta=zeta), inputs), recipe=recipe)
