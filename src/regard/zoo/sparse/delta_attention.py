"""Delta Attention: a sparse prefill corrected by every stride-th row done densely (id 232; Willette et al., 2025).

delta_r = dense_r - sparse_r for r = 0, s, 2s, ...;  o_i = sparse_i + delta_{s floor(i / s)};  the last rows are dense themselves
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal, Mechanism, Program, Sinks, Weighted, Window, bind
from regard.catalog.registry import register
from regard.engine.composed import Call
from regard.errors import RegardError

MODES = ("delta", "recompute", "sparse-only")
STREAMING = Weighted(mask=Causal() & (Window(2048) | Sinks(4)))


@register("delta-attention")
def delta_attention(sparse: Mechanism = STREAMING, stride: int = 64, mode: str = "delta") -> Program:
    """sparse: any causal mechanism (by default 4 sinks and a window of 2048). stride: rows between dense ones (1: exact). mode: "delta",
    "recompute" (dense rows replace the sparse ones, the others stay) or "sparse-only". One query runs densely."""
    if mode not in MODES:
        raise RegardError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
    if stride < 1:
        raise RegardError(f"stride={stride}; expected at least 1")
    return Program(bind(corrected, sparse=sparse, stride=stride, mode=mode), under="causal")


def dense_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, call: Call) -> Tensor:
    """Exact causal attention of some query rows over all keys."""
    offset = k.shape[-2] - q.shape[-2]
    seen = torch.arange(k.shape[-2], device=q.device) <= (rows + offset)[:, None]
    return call.attend(q[..., rows, :], k, v, Weighted(), mask=None if bool(seen.all()) else seen, scale=call.scale)


def corrected(q: Tensor, k: Tensor, v: Tensor, call: Call, *, sparse: Mechanism, stride: int, mode: str) -> Tensor:
    length = q.shape[-2]
    tail = length % stride + -(-max(128, stride) // stride) * stride if stride > 1 else 0
    if length == 1 or (tail >= length and mode != "sparse-only"):
        return call.attend(q, k, v, Weighted(), mask=Causal(), scale=call.scale)
    out = call.attend(q, k, v, sparse, mask=Causal(), scale=call.scale)
    if mode == "sparse-only":
        return out
    head = length - tail
    rows = torch.arange(0, head, stride, device=q.device)
    dense = dense_rows(q, k, v, rows, call)
    end = [dense_rows(q, k, v, torch.arange(head, length, device=q.device), call)] if tail else []
    if mode == "recompute":
        return torch.cat([out[..., :head, :].index_copy(-2, rows, dense), *end], -2)
    held = (dense - out[..., rows, :]).repeat_interleave(stride, -2)[..., :head, :]
    return torch.cat([out[..., :head, :] + held, *end], -2)
