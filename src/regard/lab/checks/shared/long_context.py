"""Softmax in groups behind landmarks, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_loop(s: Tensor, block: int) -> Tensor:
    """One head's weights (L, L), row by row from the groups."""
    length, size = s.shape[-1], block + 1
    out = torch.zeros_like(s)
    for i in range(length):
        cur = i // size
        own = [j for j in range(cur * size, i + 1) if j % size != block]
        marks = [b * size + block for b in range(cur)]
        if not own + marks:
            continue
        p0 = s[i, own + marks].softmax(0)
        out[i, own] = p0[: len(own)]
        for b in range(cur):
            inside = list(range(b * size, b * size + block))
            out[i, inside] = p0[len(own) + b] * s[i, inside].softmax(0)
    return out
