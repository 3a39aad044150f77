"""Relaxed attention: softmax smoothed towards the uniform distribution (id 71; Lohrenz et al., 2022).

p_i = (1 - gamma) softmax_j(s_ij) + gamma / n_i,   n_i = number of visible keys
"""

import torch
from torch import Tensor

from ...algebra import Hybrid, RowLocal, Weighted
from ...catalog.registry import register
from ...errors import RegardError


def even(s: Tensor) -> Tensor:
    return torch.exp(0 * s)


@register("relaxed-attention")
def relaxed_attention(gamma: float = 0.1) -> Hybrid:
    """Two calls, blended: softmax in its own fastest executor, and the mean of the visible values. The input `blend` (2,) = (1 - gamma,
    gamma) replaces gamma, so that it can be drawn anew each step; `regard.nn.RelaxedAttention` relaxes in training only."""
    if not 0 <= gamma <= 1:
        raise RegardError(f"gamma={gamma}: expected a number from 0 to 1")
    return Hybrid((Weighted(), Weighted(normalizer=RowLocal(even, even))), "blend", (1 - gamma, gamma))
