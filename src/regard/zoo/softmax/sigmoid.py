"""Sigmoid attention (id 3; Ramapuram et al., 2024).

p_ij = sigmoid(s_ij + b),   b = -log(number of visible keys) unless given; rows are not normalised
"""

import torch
from torch import Tensor

from regard.algebra import Input, Position, Recipe, RowLocal, Weighted
from regard.catalog.registry import register


def logistic(s: Tensor, bias: Tensor) -> Tensor:
    return torch.sigmoid(s + bias)


def minus_log_visible(n: Tensor) -> Tensor:
    """-log n_i: at unit-variance logits a row's weights then sum to about one."""
    return -torch.log(n.clamp_min(1))


@register("sigmoid")
def sigmoid(bias: float | None = None, position: Position | None = None, qk_norm: str = "", out_norm: str = "") -> Weighted:
    """bias: one number for all heads (the paper's causal models: -log of the training length); None: -log n_i. The input `bias`
    (H,) replaces it. position: e.g. Alibi(). qk_norm, out_norm: the paper's stabilisers in the layer ("layer", "rms")."""
    inputs = (Input("bias", "h", default=minus_log_visible if bias is None else bias),)
    return Weighted(position=position, normalizer=RowLocal(logistic, inputs=inputs), recipe=Recipe(qk_norm=qk_norm, out_norm=out_norm))
