"""Attention over quantised keys with the matrix written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nearest(k: Tensor, codebook: Tensor) -> Tensor:
    """Each key's nearest code, by loops over heads."""
    return torch.stack([codebook[h][torch.cdist(k[:, h], codebook[h]).argmin(-1)] for h in range(k.shape[1])], 1)


def dense(q: Tensor, hat: Tensor, v: Tensor, bias: Tensor | None, causal: bool = True) -> Tensor:
    """Softmax attention over quantised keys, the matrix written out; bias (H, R) or (B, H, N, R) of near distances."""
    n = q.shape[2]
    gap = torch.arange(n)[:, None] - torch.arange(n)
    s = q @ hat.mT
    if bias is not None:
        b = bias.expand(*s.shape[:-1], -1) if bias.dim() == 4 else bias[None, :, None].expand(*s.shape[:-1], -1)
        s = s + torch.where((gap >= 0) & (gap < b.shape[-1]), b.gather(-1, gap.clamp(0, b.shape[-1] - 1).expand_as(s)), 0.0)
    s = s.masked_fill(gap < 0, -math.inf) if causal else s
    return s.softmax(-1) @ v
