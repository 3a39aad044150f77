"""Inputs, masks as matrices, a selector's choice, and dense softmax under an explicit mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.algebra import Causal, Mask, Selection
from regard.algebra.part import Sizes
from regard.engine.pairs import indices
from regard.engine.problem import view_of
from regard.lab.checks.shared.comparing import F64


def qkv(n: int, d: int = 8, heads: int = 2, kv: int | None = None, m: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    kv = kv or heads
    return torch.randn(1, heads, n, d, dtype=F64), torch.randn(1, kv, m or n, d, dtype=F64), torch.randn(1, kv, m or n, d, dtype=F64)


def spelled(mask: Mask, n: int, heads: int = 1) -> Tensor:
    """A mask as an (n, n) matrix (of head 0)."""
    at = indices(Sizes(1, heads, heads, n, n, 1, 1), torch.device("cpu"))
    seen = mask.visible(at["b"], at["h"], at["i"], at["j"], {"k_len": n, "offset": 0})
    return seen.expand(1, heads, n, n)[0, 0]


def selection_of(selector: Any, q: Tensor, k: Tensor, mask: Mask | None = None, **inputs: Tensor) -> Selection:
    """What a selector chooses for scaled q and k, under Causal() unless another mask is given."""
    sizes = Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], q.shape[3])
    return selector.select(q * q.shape[3] ** -0.5, k, view_of(mask or Causal(), sizes, inputs, q.device))


def s_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dense softmax under an explicit mask, a loop over rows (empty rows are zero)."""
    rows = []
    for i in range(q.shape[2]):
        heads = []
        for h in range(q.shape[1]):
            at = mask[h, i].nonzero().squeeze(1)
            p = (k[0, h, at] @ q[0, h, i] / math.sqrt(q.shape[-1])).softmax(0) if at.numel() else None
            heads.append(v.new_zeros(v.shape[-1]) if p is None else p @ v[0, h, at])
        rows.append(torch.stack(heads))
    return torch.stack(rows, 1)[None]


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention with every weight written out; grouped heads; mask (H, Lq, Lk) or what broadcasts to it, no row empty."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf).softmax(-1) @ v
