"""Scalable-Softmax: logits grow with log n, so attention does not fade as context grows (id 13; Nakanishi, 2025).

p_i = softmax_j((s_h log n_i + b_h) z_ij),   n_i = number of keys visible to query i
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from regard.algebra import Dot, Input, Learned, Weighted
from regard.catalog.registry import register


def log_visible(n: Tensor, ssmax_scale: Tensor, ssmax_bias: Tensor) -> Tensor:
    return ssmax_scale * torch.log(n.clamp_min(1)) + ssmax_bias


@register("ssmax")
def ssmax(init: float = 0.43, bias: float = 0.0, learn_bias: bool = False) -> Weighted:
    """init: the start of the learned scale s (inputs `ssmax_scale`, `ssmax_bias`, one a head). The bias learns if `learn_bias`."""
    inputs = (
        Input("ssmax_scale", "h", default=init, layer=Learned(init)),
        Input("ssmax_bias", "h", default=bias, layer=Learned(bias, trainable=learn_bias)),
    )
    return Weighted(score=Dot(log_visible, inputs))


def calibrated_scale(lengths: Iterable[int]) -> float:
    """1 / mean log i over training positions i: swapping SSMax in with it leaves outputs unchanged on average."""
    logs = torch.cat([torch.arange(1, length + 1, dtype=torch.float64) for length in lengths]).log()
    return float(1 / logs.mean())
