"""What block selectors are written with: pooled tokens, and the choice of blocks by rank, by mass or by threshold."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = float("-inf")


def cut(x: Tensor, size: int) -> Tensor:
    """x (..., L, D) -> blocks (..., n, size, D), the last one filled up with zeros."""
    short = -x.shape[-2] % size
    return (torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x).unflatten(-2, (-1, size))


def lengths(length: int, size: int, device: torch.device | None = None) -> Tensor:
    """Tokens in each block, (n,)."""
    starts = torch.arange(0, length, size, device=device)
    return (length - starts).clamp(max=size)


def pooled(x: Tensor, size: int) -> Tensor:
    """The mean of each block of (..., L, D), over the tokens it has: (..., n, D)."""
    return cut(x, size).sum(-2) / lengths(x.shape[-2], size, x.device)[:, None].to(x.dtype)


def heads_of(k: Tensor, heads: int) -> Tensor:
    """Keys (B, Hkv, ...) for every query head."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def probabilities(scores: Tensor, allowed: Tensor) -> Tensor:
    """softmax of each row over what is allowed; a row with nothing allowed is zero."""
    return scores.masked_fill(~allowed, HIDDEN).softmax(-1).nan_to_num(0.0)


def top_k(scores: Tensor, allowed: Tensor, count: int | Tensor) -> Tensor:
    """The `count` best allowed entries of each row, bool; count may be a tensor (..., 1). Ties go to the earlier entry."""
    ranked = scores.masked_fill(~allowed, HIDDEN).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(ranked).scatter_(-1, ranked, torch.arange(ranked.shape[-1], device=scores.device).expand_as(ranked))
    return (rank < count) & allowed


def top_p(p: Tensor, mass: float, reach: bool = True) -> Tensor:
    """Of each row, the largest entries: the fewest whose sum is at least `mass` (reach), or the most whose sum is at most that."""
    ordered, ranked = p.sort(dim=-1, descending=True, stable=True)
    total = ordered.cumsum(-1)
    chosen = (total - ordered < mass) if reach else total <= mass
    chosen &= ordered > 0
    return torch.zeros_like(chosen).scatter_(-1, ranked, chosen)


def block_sums(p: Tensor, size: int) -> Tensor:
    """(..., L) -> (..., n): what each block of the last dimension sums to."""
    short = -p.shape[-1] % size
    return (torch.nn.functional.pad(p, (0, short)) if short else p).unflatten(-1, (-1, size)).sum(-1)
