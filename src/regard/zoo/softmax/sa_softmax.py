"""Self-Adjust softmax: probabilities times their own logits, so that saturated rows keep a gradient (id 4; Zheng et al., 2025).

v1: p_ij = s_ij softmax(s_i)_j      v2: p_ij = softmax(s_i)_j (s_ij - min(min s_i, 0)) / (max(0, max s_i) - min(min s_i, 0))
"""

import torch
from torch import Tensor

from regard.algebra import RowLocal, RowWise, Weighted, bind, row_max, row_softmax
from regard.algebra.normalizer import exp_shifted
from regard.catalog.registry import register
from regard.errors import RegardError


def logit_times_exp(s: Tensor, c: Tensor) -> Tensor:
    return s * torch.exp(s - c)


def range_times_softmax(s: Tensor, seen: Tensor, c_num: float, c_den: float) -> Tensor:
    low, high = -row_max(-s, seen).clamp_min(0), row_max(s, seen).clamp_min(0)
    return row_softmax(s, seen) * (s - low + c_num) / (high - low + c_den)


@register("sa-softmax")
def sa_softmax(variant: str = "v2", c_num: float = 0.0, c_den: float = 1e-10) -> Weighted:
    """variant: "v1" (signed weights that do not sum to one) or "v2" (0 <= p <= softmax; c_num and c_den are its constants)."""
    if variant == "v1":
        return Weighted(normalizer=RowLocal(logit_times_exp, exp_shifted, shift="max"))
    if variant == "v2":
        return Weighted(normalizer=RowWise(bind(range_times_softmax, c_num=c_num, c_den=c_den)))
    raise RegardError(f"variant={variant!r}; expected v1 or v2")
