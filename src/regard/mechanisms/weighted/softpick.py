"""Softpick: softmax rectified so that no sink is needed (id 43; Zuhri et al., 2025).

p_ij = relu(exp(s_ij) - 1) / (sum_j |exp(s_ij) - 1| + eps)        a row may sum to less than one, or be zero
"""

import torch
from torch import Tensor

from ...algebra import RowLocal, Weighted, bind
from ...catalog.registry import register


def rise(s: Tensor, c: Tensor) -> Tensor:
    return torch.exp(s - c) - torch.exp(-c)  # (e^s - 1) / e^c, finite for any s when c >= max(0, max s)


def picked(s: Tensor, c: Tensor) -> Tensor:
    return torch.relu(rise(s, c))


def strayed(s: Tensor, c: Tensor) -> Tensor:
    return torch.abs(rise(s, c))


def guarded(total: Tensor, c: Tensor, eps: float) -> Tensor:
    return total + eps * torch.exp(-c)


@register("softpick")
def softpick(eps: float = 1e-8) -> Weighted:
    """eps: added to the sum before any shift, so that results do not depend on how rows are tiled."""
    return Weighted(normalizer=RowLocal(picked, strayed, bind(guarded, eps=eps), shift="max0"))


def softpick_weights(x: Tensor, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """The map itself on a tensor of logits: relu(e^x - 1) / (sum |e^x - 1| + eps) along `dim`, stable for any finite x."""
    c = x.detach().amax(dim, keepdim=True).clamp_min(0)
    return picked(x, c) / (strayed(x, c).sum(dim, keepdim=True) + eps * torch.exp(-c)).clamp_min(torch.finfo(x.dtype).tiny)
