"""Padded batches for mechanisms that only know `causal`: each row runs alone on its real tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra import Causal, Mechanism
from ..engine import attend
from ..errors import RegardError


def spans(mask: Tensor, queries: int) -> list[slice] | None:
    """The real tokens of each row where mask (B, 1, Lq, Lk), True: visible, is causal over one span of them, Lq = Lk; else None."""
    count, size = mask.shape[0], mask.shape[-1]
    if mask.shape[1] != 1 or mask.shape[2] != queries or queries != size:
        return None
    at = torch.arange(size, device=mask.device)
    order, found = at[:, None] >= at, []
    for row in range(count):
        real = mask[row, 0].diagonal().nonzero().squeeze(-1)
        if len(real) == 0 or int(real[-1] - real[0]) + 1 != len(real):
            return None
        span = slice(int(real[0]), int(real[-1]) + 1)
        if not torch.equal(mask[row, 0, span], order[span] & (at >= span.start) & (at < span.stop)):
            return None
        found.append(span)
    return found


def attend_spans(q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """o (B, H, L, Dv), zero at padded queries. Raises RegardError where the mask is more than causality and padding."""
    rows = spans(mask, q.shape[2])
    if rows is None:
        raise RegardError(f"the model's mask is not causality with padding; {mechanism!r} runs under Causal() alone, or pass when='decode'")
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for at, span in enumerate(rows):
        mine = [x[at : at + 1, :, span] for x in (q, k, v)]
        out[at : at + 1, :, span] = attend(mine[0], mine[1], mine[2], mechanism, mask=Causal(), **options)
    return out
