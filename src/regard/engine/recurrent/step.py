"""One token at a time: the recurrence as written."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk import empty_state
from .pose import Scan


def step(scan: Scan, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(o, state) token by token; state (B, H, F, E)."""
    state = empty_state(scan) if state is None else state
    outputs = []
    for t in range(scan.length):
        k, v, q = scan.k[..., t, :], scan.v[..., t, :], scan.q[..., t, :]
        if scan.lift is not None:
            q, k = scan.lift.query(q), scan.lift.key(k)
        erased = None if scan.low is None else (scan.low[0][..., t, None, :] @ state).squeeze(-2)
        if scan.decay is not None:
            at = 0 if scan.decay.shape[-2] == 1 else t
            state = state * torch.exp(scan.decay[..., at, :]).unsqueeze(-1)
        if scan.beta is not None:
            v = scan.beta[..., t, :] * (v - (k.unsqueeze(-2) @ state).squeeze(-2))
        if scan.low is not None and erased is not None:
            state = state + scan.low[1][..., t, :, None] * erased.unsqueeze(-2)
        state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
        outputs.append((q.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, -2), state
