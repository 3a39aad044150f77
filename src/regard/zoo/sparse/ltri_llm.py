"""Ltri-LLM: text cut into spans by the triangles of local attention, spans stored away and retrieved (id 47; Tang et al., 2024).

T(s, e) = sum over s <= c <= t <= e of A[t, c];  score = T / n - leak - eps n, n = e - s + 1;  spans by non-maximum suppression
index of a span: its keys weighted by the attention they received, plus the mean of the queries that hit it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.algebra import Rope
from regard.algebra.blocks import heads_of
from regard.catalog.registry import register
from regard.engine.policy import Policy
from regard.errors import RegardError


@dataclass
class Stored:
    """A span: where it was, its keys and values (B, Hkv, n, D) where the index lives, its vector (B, Hkv, D), and the queries that hit it."""

    span: Span
    k: Tensor
    v: Tensor
    static: Tensor
    hit: Tensor
    hits: int = 0

    @property
    def vector(self) -> Tensor:
        return self.static + self.hit / max(1, self.hits)


class SpanIndex:
    """Spans away from the device that computes. heads: query heads whose votes count (None: all). resident_after: hits from which on
    a span is always returned."""

    def __init__(self, heads: list[int] | None = None, resident_after: int = 8, device: torch.device | str = "cpu"):
        self.heads, self.resident_after, self.device = heads, resident_after, device
        self.spans: list[Stored] = []

    def add(self, a: Tensor, spans: list[Span], k: Tensor, v: Tensor, first: int = 0) -> None:
        """Spans of tokens first, first + 1, ... with keys k and values v (B, Hkv, n, D); a (n, n): their local probabilities."""
        for s, e in spans:
            part = slice(s, e + 1)
            weight = a[part, part].sum(0)
            keys = k[:, :, part]
            static = (keys * (weight / weight.sum().clamp_min(1e-30))[:, None].to(k)).sum(2)
            stored = [x.to(self.device) for x in (keys, v[:, :, part], static)]
            self.spans.append(Stored((first + s, first + e), stored[0], stored[1], stored[2], torch.zeros_like(stored[2])))

    def scores(self, q: Tensor) -> Tensor:
        """(spans,): the largest q . vector over a chunk of queries (B, H, n, D), averaged over voting heads and batch."""
        vectors = heads_of(torch.stack([one.vector for one in self.spans], 2).to(q), q.shape[1])
        votes = (q @ vectors.transpose(-1, -2)).amax(2)
        return votes[:, self.heads].mean((0, 1)) if self.heads is not None else votes.mean((0, 1))

    def retrieve(self, q: Tensor, top: int, budget: int) -> list[Stored]:
        """The best `top` spans of at most `budget` tokens together, and resident ones, in the order of the text."""
        if not self.spans:
            return []
        order = self.scores(q).argsort(descending=True).tolist()
        resident = [n for n in order if self.spans[n].hits >= self.resident_after]
        chosen: list[int] = []
        for n in [*resident, *[n for n in order if n not in resident][:top]]:
            size = self.spans[n].k.shape[2]
            if size <= budget:
                chosen.append(n)
                budget -= size
        groups = q.unflatten(1, (self.spans[0].k.shape[1], -1)).mean((2, 3)).to(self.device)
        for n in chosen:
            self.spans[n].hit = self.spans[n].hit + groups
            self.spans[n].hits += 1
        return [self.spans[n] for n in sorted(chosen)]


@register("ltri-llm", kind="policy")
class LtriStream:
    """One layer's stream: unrotated q (B, H, n, D), k, v (B, Hkv, n, D) of a chunk after another -> (B, H, n, Dv).

    A chunk reads [first `sinks` tokens | retrieved spans | last `window` tokens | itself], placed one after another under `rope`
    (None: no positions). top, budget: spans and tokens retrieved a chunk. Tokens that leave the window become spans of the index.
    """

    def __init__(
        self, *, window: int = 1024, sinks: int = 4, top: int = 16, budget: int = 1024, rope: Rope | None = None,
        index: SpanIndex | None = None, shortest: int = 4, longest: int = 40,
    ):  # fmt: skip
        if min(window, sinks, top, budget) < 1:
            raise RegardError(f"window={window}, sinks={sinks}, top={top}, budget={budget}: expected positive numbers")
        self.window, self.sinks, self.top, self.budget, self.rope = window, sinks, top, budget, rope
        self.limits = (shortest, longest)
        self.index = index or SpanIndex()
        self.sink: tuple[Tensor, Tensor] | None = None
        self.local: tuple[Tensor, Tensor] | None = None
        self.a = torch.zeros(0, 0)  # probabilities among local tokens, head-averaged
        self.first = 0  # the first local token
        self.read: list[Span] = []

    @property
    def resident(self) -> int:
        """Keys held where attention is computed."""
        return sum(part[0].shape[2] for part in (self.sink, self.local) if part is not None)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.sink is None or self.local is None:
            self.sink = k[:, :, :0], v[:, :, :0]
            self.local = k[:, :, :0], v[:, :, :0]
        spans = self.index.retrieve(q, self.top, self.budget)
        self.read = [one.span for one in spans]
        keys, values = (
            torch.cat((self.sink[n], *[(one.k, one.v)[n].to(k) for one in spans], self.local[n], new), 2) for n, new in ((0, k), (1, v))
        )
        n, total, old = q.shape[2], keys.shape[2], self.local[0].shape[2]
        at = torch.arange(total, device=q.device)
        turned_q, turned_k = (q, keys) if self.rope is None else (self.rope.rotate(q, at[total - n :]), self.rope.rotate(keys, at))
        s = turned_q @ heads_of(turned_k, q.shape[1]).transpose(-1, -2) * q.shape[-1] ** -0.5
        seen = at <= at[total - n :, None]
        Policy.count(seen, q.shape[0] * q.shape[1])
        p = s.masked_fill(~seen, float("-inf")).softmax(-1)
        self.a = torch.nn.functional.pad(self.a.to(p), (0, n, 0, n))
        self.a[old:] = p.mean((0, 1))[:, total - n - old :]
        self.local = torch.cat((self.local[0], k), 2), torch.cat((self.local[1], v), 2)
        self.forget()
        return p @ heads_of(values, q.shape[1])

    def forget(self) -> None:
        """The first tokens become sinks, and what the window has left behind becomes spans."""
        assert self.sink is not None and self.local is not None
        short = min(self.sinks - self.sink[0].shape[2], self.local[0].shape[2])
        if short > 0:
            self.sink = tuple(torch.cat((a, b[:, :, :short]), 2) for a, b in zip(self.sink, self.local, strict=True))  # type: ignore[assignment]
            self.drop(short)
        extra = self.local[0].shape[2] - self.window
        if extra > 0:
            spans = [span for span in find_spans(self.a, *self.limits) if span[1] < extra]
            end = spans[-1][1] + 1 if spans else 0
            if extra - end > self.limits[1]:  # a span longer than any: it goes as far as it has come
                spans.append((end, extra - 1))
                end = extra
            self.index.add(self.a, spans, self.local[0][:, :, :end], self.local[1][:, :, :end], self.first)
            self.drop(end)

    def drop(self, count: int) -> None:
        assert self.local is not None
        self.local = self.local[0][:, :, count:], self.local[1][:, :, count:]
        self.a, self.first = self.a[count:, count:], self.first + count


class Ltri(Policy):
    """`LtriStream` in every layer of a frozen model, fed a prompt in chunks of `chunk` tokens; the options are the stream's."""

    rotated = False

    def __init__(self, chunk: int = 128, **options: Any):
        self.chunk, self.options = chunk, options
        LtriStream(**options)  # says at once what is wrong with them

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stream = LtriStream(rope=self.rope, **self.options)
        return torch.cat([stream(*part) for part in zip(*(x.split(self.chunk, 2) for x in (q, k, v)), strict=True)], 2)


Span = tuple[int, int]  # first and last token
Score = Callable[[Tensor, Tensor, Tensor], Tensor]  # (T, leak, n) -> score


def prefix(a: Tensor) -> Tensor:
    return torch.nn.functional.pad(a, (1, 0, 1, 0)).cumsum(0).cumsum(1)


def triangle_mass(a: Tensor) -> Tensor:
    """T[s, e] for s <= e (0 elsewhere) of causal a (n, n)."""
    p, n = prefix(a.tril()), a.shape[0]
    s, e = torch.arange(n, device=a.device)[:, None], torch.arange(n, device=a.device) + 1
    return (p[e, e] - p[s, e] - p[e, s] + p[s, s]).triu()


def leaks(a: Tensor, rows: int = 8) -> Tensor:
    """leak[s, e]: mean mass that the next min(rows, rest) rows put on columns s .. e; 0 after the last row."""
    p, n = prefix(a), a.shape[0]
    s, e = torch.arange(n, device=a.device)[:, None], torch.arange(n, device=a.device)
    end = (e + 1 + rows).clamp(max=n)
    mass = p[end, e + 1] - p[end, s] - p[e + 1, e + 1] + p[e + 1, s]
    return (mass / (end - e - 1).clamp(min=1)).triu()


def compactness(mass: Tensor, leak: Tensor, size: Tensor, eps: float = 0.004) -> Tensor:
    return mass / size - leak - eps * size


def find_spans(a: Tensor, shortest: int = 4, longest: int = 40, overlap: float = 0.1, score: Score = compactness) -> list[Span]:
    """Spans that tile 0 .. n - 1 of local probabilities a (n, n): best first, none overlapping an earlier one (IoU) more than `overlap`;
    what is left between them are spans too."""
    n = a.shape[0]
    size = torch.arange(n, device=a.device) - torch.arange(n, device=a.device)[:, None] + 1
    values = score(triangle_mass(a), leaks(a), size.clamp(min=1).to(a.dtype))
    s, e = ((size >= shortest) & (size <= longest)).nonzero().unbind(1)
    order = values[s, e].argsort(descending=True, stable=True)
    s, e = s[order], e[order]  # candidates, the best first; one stays possible while it holds free tokens and overlaps no taken span much
    possible, free = torch.ones_like(s, dtype=torch.bool), torch.ones(n, dtype=torch.long, device=a.device)
    taken: list[Span] = []
    while bool(possible.any()):
        at = int(possible.int().argmax())
        inside = free[s[at] : e[at] + 1].nonzero()
        first, last = int(s[at] + inside[0]), int(s[at] + inside[-1])
        taken.append((first, last))
        free[first : last + 1] = 0
        shared = (e.clamp(max=last) - s.clamp(min=first) + 1).clamp(min=0)
        room = torch.nn.functional.pad(free.cumsum(0), (1, 0))
        possible &= (shared <= overlap * (e.clamp(min=last) - s.clamp(max=first) + 1)) & (room[e + 1] > room[s])
    taken.sort()
    tiles, at = [], 0
    for first, last in [*taken, (n, n)]:
        if at < first:
            tiles.append((at, first - 1))
        if first < n:
            tiles.append((first, last))
        at = last + 1
    return tiles
