"""LeanAttention: decoding cut into equal tiles of keys that are dealt evenly to workers (id 104; Sanovar et al., 2024).

tile of one (sequence, key head): m = max s, l = sum exp(s - m), U = sum exp(s - m) v;   merge f(x, y): m = max, l and U scaled by exp(m_x - m)
worker g of G takes tiles [floor(g N / G), floor((g + 1) N / G)) of all N; the one with a head's first tile is its host and merges its peers'
Not built: the persistent GPU kernel; the schedule runs in PyTorch on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError

SCORES = 2**22  # numbers that a worker holds at a time
Partial = tuple[Tensor, Tensor, Tensor]  # m (..., 1), l (..., 1), U (..., D), in at least float32


def identity(rows: tuple[int, ...], dim: int, like: Tensor) -> Partial:
    """The partial result of no keys."""
    return like.new_full((*rows, 1), -torch.inf), like.new_zeros(*rows, 1), like.new_zeros(*rows, dim)


def merge(x: Partial, y: Partial) -> Partial:
    """The partial result of both sets of keys: associative and commutative."""
    m = torch.maximum(x[0], y[0])
    shift = torch.where(m.isneginf(), 0.0, m)
    a, b = torch.exp(x[0] - shift), torch.exp(y[0] - shift)
    return m, a * x[1] + b * y[1], a * x[2] + b * y[2]


@dataclass(frozen=True)
class Span:
    """Tiles first <= t < stop of one head, done by one worker."""

    worker: int
    head: int
    first: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """tiles: how many each head has, a head a (sequence, key head); workers: how many take them. spans: in the order of all tiles."""

    tiles: tuple[int, ...]
    workers: int
    spans: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        starts = [0]
        for count in self.tiles:
            starts.append(starts[-1] + count)
        spans, head = [], 0
        for worker, (at, stop) in enumerate(self.range_of(g) for g in range(self.workers)):
            while at < stop:
                while starts[head + 1] <= at:
                    head += 1
                end = min(stop, starts[head + 1])
                spans.append(Span(worker, head, at - starts[head], end - starts[head]))
                at = end
        object.__setattr__(self, "spans", spans)

    @property
    def total(self) -> int:
        return sum(self.tiles)

    def range_of(self, worker: int) -> tuple[int, int]:
        """First and one past last of the tiles of a worker."""
        return worker * self.total // self.workers, (worker + 1) * self.total // self.workers

    @property
    def partials(self) -> int:
        """Results that go through scratch memory: those of workers that are not their head's host."""
        return sum(span.first > 0 for span in self.spans)


def schedule(lengths: Sequence[int], kv_heads: int, tile: int = 256, workers: int = 16) -> Schedule:
    """Tiles of `tile` keys over sequences of these lengths (the paper: 256 for head size 64, 128 for 128) and workers that are even to one tile."""
    if tile < 1 or workers < 1 or kv_heads < 1 or any(n < 0 for n in lengths):
        raise RegardError(f"lengths={list(lengths)}, kv_heads={kv_heads}, tile={tile}, workers={workers}: expected positive numbers")
    return Schedule(tuple(-(-n // tile) for n in lengths for _ in range(kv_heads)), workers)


@register("leanattention", kind="function")
def lean_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    *,
    tile: int = 256,
    workers: int = 16,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, H, n, D), k, v (B, Hkv, L, D) -> softmax attention (B, H, n, Dv) and log-sum-exps (B, H, n), as the schedule's workers compute it.

    lengths (B,): keys of each sequence that are there, the first ones (None: all); no others are read. causal: the n queries are the last
    tokens of their sequence. scale: None is D^-1/2. A sequence without keys gives zeros and -inf. No gradients. Query heads of a key head share
    its tiles.
    """
    if (
        q.dim() != 4
        or k.dim() != 4
        or k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[-1] != k.shape[-1]
        or q.shape[1] % k.shape[1]
    ):
        raise RegardError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (B, H, n, D), (B, Hkv, L, D), (B, Hkv, L, Dv)"
        )
    batch, heads, n, dim = q.shape
    kv = k.shape[1]
    sizes = [k.shape[2]] * batch if lengths is None else [int(x) for x in lengths]
    if len(sizes) != batch or any(not 0 <= x <= k.shape[2] for x in sizes):
        raise RegardError(f"lengths={sizes}: expected {batch} numbers from 0 to {k.shape[2]}")
    plan = schedule(sizes, kv, tile, workers)
    wide = torch.promote_types(q.dtype, torch.float32)
    if not batch:
        return q.new_zeros(0, heads, n, v.shape[-1]), q.new_zeros(0, heads, n, dtype=wide)
    with torch.no_grad():
        grouped = q.to(wide).unflatten(1, (kv, -1)) * (dim**-0.5 if scale is None else scale)  # (B, Hkv, group, n, D)

        step = max(1, SCORES // (heads // kv * n * tile))  # tiles at a time: a worker's tiles are one matrix, as far as its scores are few

        def part(head: int, first: int, last: int) -> Partial:
            row, at = divmod(head, kv)
            start, stop = first * tile, min(last * tile, sizes[row])
            s = grouped[row, at] @ k[row, at, start:stop].to(wide).T
            if causal and stop > sizes[row] - n + 1:
                seen = sizes[row] - n + torch.arange(n, device=q.device)
                s = s.masked_fill(torch.arange(start, stop, device=q.device) > seen[:, None], -torch.inf)
            m = s.amax(-1, keepdim=True)
            p = torch.exp(s - torch.where(m.isneginf(), 0.0, m))
            return m, p.sum(-1, keepdim=True), p @ v[row, at, start:stop].to(wide)

        held = [identity((heads // kv, n), v.shape[-1], grouped)] * (batch * kv)
        for span in plan.spans:
            pieces = (part(span.head, at, min(at + step, span.stop)) for at in range(span.first, span.stop, step))
            own = reduce(merge, pieces)
            held[span.head] = own if span.first == 0 else merge(held[span.head], own)  # the host, then its peers
        m, total, u = (torch.stack(x).unflatten(0, (batch, kv)).flatten(1, 2) for x in zip(*held, strict=True))
        out = torch.where(total > 0, u / total.clamp_min(torch.finfo(wide).tiny), 0.0)
        return out.to(q.dtype), (m + total.log())[..., 0]
