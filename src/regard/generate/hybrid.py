"""Attention of a tree's nodes: a long prefix that all see, and a short tail under the tree's mask, merged exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import Weighted
from ..engine.door import attend_with_stats
from ..errors import RegardError


def hybrid_tree_attention(q: Tensor, k: Tensor, v: Tensor, n_prefix: int, tree_mask: Tensor, scale: float | None = None) -> Tensor:
    """q (B, H, n, D) over k, v (B, Hkv, n_prefix + m, D): the first n_prefix keys are seen by all, of the others what tree_mask (B or 1, n, m) bool says."""
    if not 0 <= n_prefix <= k.shape[2] or tree_mask.shape[1:] != (q.shape[2], k.shape[2] - n_prefix) or q.shape[1] % k.shape[1]:
        raise RegardError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, n_prefix={n_prefix}, tree_mask {tuple(tree_mask.shape)}: expected (B, n, keys behind)"
        )
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    kt, vt = (x[:, :, n_prefix:].to(wide).repeat_interleave(group, 1) for x in (k, v))
    s = (q.to(wide) @ kt.transpose(-1, -2) * scale).masked_fill(~tree_mask[:, None], -torch.inf)
    lse_t = s.logsumexp(-1, keepdim=True)
    blind = lse_t.isneginf()
    o_t = torch.where(blind, 0.0, torch.exp(s - torch.where(blind, 0.0, lse_t))) @ vt
    if n_prefix == 0:
        return o_t.to(q.dtype)
    o_p, stats = attend_with_stats(q, k[:, :, :n_prefix], v[:, :, :n_prefix], Weighted(), scale=scale)
    w = torch.sigmoid(stats.shift + stats.total.log() - lse_t)
    return (w * o_p.to(wide) + (1 - w) * o_t).to(q.dtype)
