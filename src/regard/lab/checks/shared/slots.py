"""Gated slots and a window, a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv


def slot_loop(q: Tensor, k: Tensor, v: Tensor, f: Tensor, s: Tensor, window: int = 0, scale: float = 1.0, arrival: bool = False) -> Tensor:
    """Slots and window a token at a time: written when a token leaves the window (or, wrongly, on arrival)."""
    b, h, n, d = q.shape
    out = torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype)
    for at in [(x, y) for x in range(b) for y in range(h)]:
        keys, values = torch.zeros(f.shape[-1], d, dtype=q.dtype), torch.zeros(f.shape[-1], v.shape[-1], dtype=q.dtype)
        for t in range(n):
            e = t if arrival else t - window
            if e >= 0:
                keys = f[at][e][:, None] * keys + s[at][e][:, None] * k[at][e]
                values = f[at][e][:, None] * values + s[at][e][:, None] * v[at][e]
            start = max(0, t - window + 1) if window else t + 1
            one = torch.cat((keys, k[at][start : t + 1])) if e >= 0 else k[at][start : t + 1]
            two = torch.cat((values, v[at][start : t + 1])) if e >= 0 else v[at][start : t + 1]
            out[at][t] = torch.softmax(scale * one @ q[at][t], 0) @ two
    return out


def slot_inputs(n: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *qkv(n), -strength * torch.rand(1, 2, n, 6, dtype=F64)
