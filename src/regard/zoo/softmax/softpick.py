"""Softpick: softmax rectified so that no sink is needed (id 43; Zuhri et al., 2025).

p_ij = relu(exp(s_ij) - 1) / (sum_j |exp(s_ij) - 1| + eps e^{m_i}),   m_i = max(0, max_j s_ij)        a row may sum to less than one, or be zero
"""

import torch
from torch import Tensor

from regard.algebra import RowLocal, Weighted, bind
from regard.catalog.registry import register


def rise(s: Tensor, c: Tensor) -> Tensor:
    return torch.exp(s - c) - torch.exp(-c)  # (e^s - 1) / e^c, finite for any s when c >= max(0, max s)


def picked(s: Tensor, c: Tensor) -> Tensor:
    return torch.relu(rise(s, c))


def strayed(s: Tensor, c: Tensor) -> Tensor:
    return torch.abs(rise(s, c))


def guarded(total: Tensor, eps: float) -> Tensor:
    return total + eps


@register("softpick")
def softpick(eps: float = 1e-8) -> Weighted:
    """eps: added to the sum over e^m, as released; at 1e-8 below what float32 resolves."""
    return Weighted(normalizer=RowLocal(picked, strayed, bind(guarded, eps=eps), shift="max0", anchor=eps))


def softpick_weights(x: Tensor, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """The map itself on logits along `dim`, stable for any finite x. Entries of -inf weigh 0 and do not count in the sum."""
    seen = x > float("-inf")
    c = x.detach().amax(dim, keepdim=True).clamp_min(0)
    inside = torch.where(seen, x, c)
    total = torch.where(seen, strayed(inside, c), 0.0).sum(dim, keepdim=True)
    return torch.where(seen, picked(inside, c), 0.0) / (total + eps).clamp_min(torch.finfo(x.dtype).tiny)
