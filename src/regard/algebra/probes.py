"""What a few queries tell about all keys: where their attention lies, summed over columns and over diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 32  # queries looked at together, one head after the other: their scores stay in the cache


@torch.no_grad()
def probed(q: Tensor, k: Tensor, rows: Tensor, window: int = 0, diagonals: bool = False) -> tuple[Tensor, Tensor]:
    """The causal probabilities of the queries at `rows` (n,), rising, summed: for each key, and for each distance i - j, (B, H, L) both.

    q (B, H, n, D) times scale, k (B, Hkv, L, D). window: keys nearer than that are left out of the first sum. diagonals: the second
    sum is wanted, for which rows must follow one another (else it is zero).
    """
    heads, length, at = q.shape[1], k.shape[-2], rows.tolist()
    columns, slashes = (q.new_zeros(q.shape[0], heads, length) for _ in range(2))
    room = q.new_zeros(ROWS, ROWS + length)
    place = torch.arange(length, device=q.device)
    for b, h in [(b, h) for b in range(q.shape[0]) for h in range(heads)]:
        keys = k[b, h * k.shape[1] // heads].T
        for start in range(0, len(at), ROWS):
            own = rows[start : start + ROWS, None]
            count, low, high = len(own), at[start], at[min(start + ROWS, len(at)) - 1]
            p = room[:count, count - 1 : count + high]
            torch.mm(q[b, h, start : start + ROWS], keys[:, : high + 1], out=p)
            p[:, low:].masked_fill_(place[low : high + 1] > own, float("-inf"))
            weight = p.sub_(p.amax(-1, keepdim=True)).exp_().sum(-1).reciprocal()
            if diagonals:  # read one place further a row, distances stand in columns
                room[:, : count - 1] = 0
                slashes[b, h, : high + 1] += (weight @ room.as_strided((count, high + 1), (room.shape[1] + 1, 1))).flip(0)
            if window:
                near = max(0, low - window + 1)
                p[:, near:].masked_fill_(place[near : high + 1] > own - window, 0.0)
            columns[b, h, : high + 1] += weight @ p
    return columns, slashes


def last_mass(q: Tensor, k: Tensor, size: int, diagonals: bool = False) -> tuple[Tensor, Tensor]:
    """The mean causal mass the last `size` queries give to each key and, if asked, to each distance, (B, H, L) both."""
    length = k.shape[-2]
    columns, slashes = probed(q[..., -size:, :], k, torch.arange(length - size, length, device=q.device), diagonals=diagonals)
    return columns / size, slashes / size
