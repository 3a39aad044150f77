"""Combiner: every allowed key is reached, near ones directly, the others through a summary of their region (id 175; Ren et al., 2021).

p(j | i) = p~(j | i) for j in D_i, else p~(r | i) p(j | Omega_r);  one softmax over q_i.k_j, j in D_i, and q_i.k_Omega_r, p(j | Omega_r) = softmax(q_Omega_r.k_j)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes

PATTERNS = ("fixed", "logsparse", "axial")


def pooled(x: Tensor, pool: str) -> Tensor:
    """(..., n, D) -> (..., D)."""
    return x.amax(-2) if pool == "max" else x.mean(-2) if pool == "mean" else x.sum(-2)


def summaries(q: Tensor, k: Tensor, v: Tensor, pool: str, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(keys (..., D), values (..., Dv)) of regions of tokens (..., n, .); seen (..., n): which of them belong to it."""
    if seen is not None:
        fill = -math.inf if pool == "max" else 0.0
        some = seen.any(-1)[..., None]
        q_pool, k_pool = (torch.where(some, pooled(torch.where(seen[..., None], x, fill), pool), 0.0) for x in (q, k))
        if pool == "mean":  # of those seen
            share = seen.shape[-1] / seen.sum(-1).clamp_min(1)[..., None].to(q.dtype)
            q_pool, k_pool = q_pool * share, k_pool * share
    else:
        q_pool, k_pool = pooled(q, pool), pooled(k, pool)
    s = (k @ q_pool[..., None])[..., 0]
    s = s if seen is None else s.masked_fill(~seen, -1e30)
    return k_pool, (torch.softmax(s, -1)[..., None, :] @ v)[..., 0, :]


def blocks(x: Tensor, size: int) -> Tensor:
    return x.unflatten(2, (-1, size))


def fixed(q: Tensor, k: Tensor, v: Tensor, causal: bool, size: int, pool: str) -> Tensor:
    """Own segment directly, other (earlier) segments by their summaries: O(N (size + N / size))."""
    n, fill = q.shape[2], -q.shape[2] % size
    bq, bk, bv = (blocks(F.pad(x, (0, 0, 0, fill)), size) for x in (q, k, v))
    count = bq.shape[2]
    real = (torch.arange(count * size, device=q.device) < n).view(count, size)
    keys, values = summaries(bq, bk, bv, pool, real if fill else None)
    near = bq @ bk.mT
    at = torch.arange(size, device=q.device)
    near = near.masked_fill((at[:, None] < at) if causal else ~real[:, None], -math.inf)
    segment = torch.arange(count, device=q.device)
    hidden = segment[:, None] <= segment if causal else segment[:, None] == segment
    far = (bq @ keys.mT[:, :, None]).masked_fill(hidden[:, None], -math.inf)
    p = torch.softmax(torch.cat((near, far), -1), -1)
    out = p[..., :size] @ bv + p[..., size:] @ values[:, :, None]
    return out.flatten(2, 3)[:, :, :n]


def logsparse(q: Tensor, k: Tensor, v: Tensor, causal: bool, size: int, pool: str) -> Tensor:
    """The token itself, and spans of doubling length before it (and after it): O(N log N)."""
    n = q.shape[2]
    depth = max(1, (n - 1).bit_length())
    fill = (1 << depth) - n
    q, k, v = (F.pad(x, (0, 0, 0, fill)) for x in (q, k, v))
    total = q.shape[2]
    real = torch.arange(total, device=q.device) < n
    at = torch.arange(total, device=q.device)
    logits, values = [(q * k).sum(-1, keepdim=True)], [v[:, :, :, None]]
    for level in range(depth):
        bq, bk, bv = (blocks(x, 1 << level) for x in (q, k, v))
        keys, read = summaries(bq, bk, bv, pool, real.view(-1, 1 << level) if fill else None)
        block = at >> level
        # The span before i at this level is the block left of i's, if i's number is odd; after i, the block right of it, if even.
        for side, there in ((-1, block % 2 == 1), (1, block % 2 == 0)):
            if side == 1 and causal:
                continue
            other = (block + side).clamp(0, keys.shape[2] - 1)
            there = there & ((other << level) < n)
            logits.append((q * keys[:, :, other]).sum(-1, keepdim=True).masked_fill(~there[:, None], -math.inf))
            values.append(read[:, :, other][:, :, :, None])
    p = torch.softmax(torch.cat(logits, -1), -1)
    return (p[..., None, :] @ torch.cat(values, 3))[..., 0, :][:, :, :n]


def axial(q: Tensor, k: Tensor, v: Tensor, causal: bool, size: int, pool: str) -> Tensor:
    """Tokens as a grid `size` wide: own row and own column directly, each other column by a summary of its (earlier) rows: O(N sqrt N)."""
    n = q.shape[2]
    if n % size:
        raise RegardError(f"seg_len={size}: an axial pattern needs whole rows; expected a divisor of the length {n}")
    gq, gk, gv = (blocks(x, size) for x in (q, k, v))  # (B, H, R, C, .)
    rows, columns = gq.shape[2:4]
    r, c = torch.arange(rows, device=q.device), torch.arange(columns, device=q.device)
    own_row = gq @ gk.mT
    own_row = own_row.masked_fill(c[:, None] < c, -math.inf) if causal else own_row
    q_up, k_up, v_up = (x.transpose(2, 3) for x in (gq, gk, gv))  # (B, H, C, R, .)
    other_rows = r[:, None] > r if causal else r[:, None] != r
    own_column = (q_up @ k_up.mT).masked_fill(~other_rows, -math.inf).transpose(2, 3)  # (B, H, R, C, R)
    # Region (row, column): the other (earlier) rows of that column.
    wide_q, wide_k, wide_v = (x[:, :, None].expand(-1, -1, rows, -1, -1, -1) for x in (q_up, k_up, v_up))
    keys, values = summaries(wide_q, wide_k, wide_v, pool, other_rows[:, None].expand(-1, columns, -1))
    region = gq @ keys.mT  # (B, H, R, C, C)
    empty = ~other_rows.any(-1)[:, None, None] | (c[:, None] == c)
    region = region.masked_fill(empty, -math.inf)
    p = torch.softmax(torch.cat((own_row, own_column, region), -1), -1)
    out = p[..., :columns] @ gv + p[..., columns + rows :] @ values
    out = out + (p[..., columns : columns + rows].transpose(2, 3) @ v_up).transpose(2, 3)
    return out.flatten(2, 3)


RUN: dict[str, Callable[[Tensor, Tensor, Tensor, bool, int, str], Tensor]] = {"fixed": fixed, "logsparse": logsparse, "axial": axial}


def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str = "fixed",
    seg_len: int | None = None,
    causal: bool = True,
    pool: str = "max",
    scale: float | None = None,
) -> Tensor:
    """q, k (B, H, N, D), v (B, H, N, Dv) -> (B, H, N, Dv). pattern: "fixed" (segments of seg_len), "logsparse" or "axial" (a grid seg_len wide).
    seg_len None: about sqrt(N). pool: "max", "mean" or "sum" of a region's keys and queries."""
    if pattern not in PATTERNS or pool not in ("max", "mean", "sum"):
        raise RegardError(f"pattern={pattern!r}, pool={pool!r}; expected one of {', '.join(PATTERNS)}, and max, mean or sum")
    if not q.shape[:3] == k.shape[:3] == v.shape[:3]:
        raise RegardError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected the same batch, heads and length")
    n = q.shape[2]
    size = max(1, round(n**0.5)) if seg_len is None else seg_len
    if seg_len is None and pattern == "axial":
        size = next(width for width in range(size, 0, -1) if n % width == 0)
    if size < 1:
        raise RegardError(f"seg_len={seg_len}; expected at least 1")
    return RUN[pattern](q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, causal, size, pool)


@register("combiner", kind="module")
class CombinerAttention(torch.nn.Module):
    """x (B, N, dim) -> (B, N, dim). pattern, seg_len, causal, pool: as of `combiner_attention`. `implied_matrix(x)` is the whole stochastic
    matrix (B, heads, N, N), for audit."""

    def __init__(self, dim: int, heads: int, pattern: str = "fixed", seg_len: int | None = None, causal: bool = True, pool: str = "max"):
        super().__init__()
        self.dim = dim
        if dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads, self.pattern, self.seg_len, self.causal, self.pool = heads, pattern, seg_len, causal, pool
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim, False), torch.nn.Linear(dim, dim, False)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return q, k, v

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return combiner_attention(q, k, v, self.pattern, self.seg_len, self.causal, self.pool)

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attended(*self.heads_of(x)).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @torch.no_grad()
    def implied_matrix(self, x: Tensor) -> Tensor:
        q, k, _ = self.heads_of(x)
        return self.attended(q, k, torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(*q.shape[:2], -1, -1))
