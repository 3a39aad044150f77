"""PyTorch's own fused kernel, for softmax over dot products under no mask, a causal one, or one small enough to spell out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.mask import Causal, Full, Mask
from ..algebra.part import Sizes
from .problem import Problem

SMALL_MASK = 1 << 20  # elements of an explicit mask worth building


def form(mask: Mask, sizes: Sizes) -> str | None:
    """How SDPA expresses a mask: "full", "causal", "explicit", or None when it cannot."""
    if isinstance(mask, Full):
        return "full"
    if isinstance(mask, Causal):
        if sizes.q_len == sizes.k_len:
            return "causal"
        if sizes.q_len == 1:
            return "full"
        if sizes.q_len < sizes.k_len and sizes.q_len * sizes.k_len <= SMALL_MASK:
            return "explicit"  # is_causal would align queries to the first keys, not to the last
    return None


def call(q: Tensor, k: Tensor, v: Tensor, how: str, scale: float | None) -> Tensor:
    mask = None
    if how == "explicit":
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=how == "causal", scale=scale, enable_gqa=grouped)


def run(problem: Problem) -> Tensor:
    """Prepared q already carries the scale."""
    how = form(problem.mask, problem.sizes)
    assert how is not None
    return call(problem.q.to(problem.v.dtype), problem.k.to(problem.v.dtype), problem.v, how, 1.0)
