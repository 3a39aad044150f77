"""What a causal window adds to a row of weights: the sums of softmax over the last keys, not divided yet, so that other terms can join them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError


class Sums(NamedTuple):
    """values (B, H, Lq, Dv) = sum_j exp(s_ij - top_i) v_j, mass (B, H, Lq, 1) = sum_j exp(s_ij - top_i), top (B, H, Lq, 1) = max_j s_ij; all
    zero for a query that sees nothing."""

    values: Tensor
    mass: Tensor
    top: Tensor


def window_sums(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None, keep: Tensor | None = None) -> Sums:
    """q (B, H, Lq, D) over the last `window` of keys k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv), itself counted; queries stand at the end of the keys.

    keep (B, Lk) bool: keys that are there. Costs Lq times window, in blocks of as many queries; at least float32. Differentiable as often as
    is wanted, every part of it.
    """
    if window < 1 or q.shape[2] > k.shape[2] or q.shape[1] % k.shape[1]:
        raise RegardError(f"window={window}, q {tuple(q.shape)}, k {tuple(k.shape)}: expected at least 1, and a key for every query")
    wide = torch.promote_types(q.dtype, torch.float32)
    length, size = q.shape[2], max(1, min(window, q.shape[2]))
    fill, before = -length % size, window - 1
    reach = before + size  # keys that a block of queries reads
    have = k.shape[2] - length
    edge = (before - have, fill)  # a negative pad takes away the keys that no query reads
    seen = torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device) if keep is None else keep
    if keep is not None:  # what stands in padding, NaN even, must reach nothing
        k, v = (torch.where(keep[:, None, :, None], x, 0.0) for x in (k, v))
    seen = F.pad(seen, edge).unfold(-1, reach, size)[:, None, None, :, None]
    keys, values = (F.pad(x.to(wide), (0, 0, *edge)).unfold(2, reach, size)[:, :, None] for x in (k, v))
    queries = F.pad(q.to(wide), (0, 0, 0, fill)).unflatten(2, (-1, size)).unflatten(1, (k.shape[1], -1))
    s = (queries * (q.shape[-1] ** -0.5 if scale is None else scale)) @ keys
    at = torch.arange(reach, device=q.device) - torch.arange(size, device=q.device)[:, None]
    seen = seen & (at >= 0) & (at < window)
    s = s.masked_fill(~seen, -torch.inf)
    top = s.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    p = torch.exp(s - top)
    found = (p @ values.transpose(-1, -2), p.sum(-1, keepdim=True), top)
    return Sums(*(x.flatten(1, 2).flatten(2, 3)[:, :, :length] for x in found))
