"""Checks of ltri-llm."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from regard.algebra import Rope
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.ltri_llm import LtriStream, Span, SpanIndex, find_spans, triangle_mass


@check("ltri-llm", "triangle mass of every span equals the double sum", below=1e-12, control="the square's mass, future included")
def _() -> tuple[float, float]:
    a = torch.rand(24, 24, dtype=F64)
    truth, square = torch.zeros(24, 24, dtype=F64), torch.zeros(24, 24, dtype=F64)
    for s in range(24):
        for e in range(s, 24):
            truth[s, e] = sum(a[t, c] for t in range(s, e + 1) for c in range(s, t + 1))
            square[s, e] = a[s : e + 1, s : e + 1].sum()
    found = triangle_mass(a)
    return naive.gap(found, truth), naive.gap(square, truth)


def planted_spans(seed: int, length: int = 256) -> tuple[Tensor, list[Span]]:
    """Causal probabilities whose rows stay in their span, but for 30% spread over the past."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    spans, at = [], 0
    while at < length:
        size = min(draw.randint(8, 28), length - at)
        size = length - at if length - at - size < 8 else size
        spans.append((at, at + size - 1))
        at += size
    a = torch.zeros(length, length, dtype=F64)
    for s, e in spans:
        a[s : e + 1, s : e + 1] = torch.rand(e - s + 1, e - s + 1, generator=generator, dtype=F64).tril()
    a = (a.tril() / a.tril().sum(-1, keepdim=True)) * 0.7
    noise = torch.rand(length, length, generator=generator, dtype=F64).tril()
    return a + 0.3 * noise / noise.sum(-1, keepdim=True), spans


@check(
    "ltri-llm",
    "planted spans of 8 to 28 tokens under 30% noise, 5 seeds: share found, both ends within a token",
    above=0.95,
    control="pieces of 18 tokens",
)
def _() -> tuple[float, float]:
    hits = [0, 0]
    total = 0
    for seed in range(5):
        a, spans = planted_spans(seed)
        fixed = [(at, at + 17) for at in range(0, 256, 18)]
        for n, found in enumerate((find_spans(a), fixed)):
            hits[n] += sum(any(abs(s - x) <= 1 and abs(e - y) <= 1 for x, y in found) for s, e in spans)
        total += len(spans)
    return hits[0] / total, hits[1] / total


@check(
    "ltri-llm",
    "spans tile the sequence, for 20 random maps: gaps and overlaps",
    below=0,
    control="without the short pieces left between spans",
)
def _() -> tuple[float, float]:
    wrong = [0, 0]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a = torch.rand(60, 60, generator=generator, dtype=F64).tril() ** 4
        a = a / a.sum(-1, keepdim=True)
        spans = find_spans(a)
        for n, kept in enumerate((spans, [(s, e) for s, e in spans if e - s >= 3])):
            wrong[n] += [t for s, e in kept for t in range(s, e + 1)] != list(range(60))
    return float(wrong[0]), float(wrong[1])


@check(
    "ltri-llm", "2048 keys, one span with the query's key: its rank among retrieved spans", below=2, control="static vectors set to zero"
)
def _() -> tuple[float, float]:
    k, v, q = torch.randn(1, 2, 2048, 16, dtype=F64), torch.randn(1, 2, 2048, 16, dtype=F64), torch.randn(1, 4, 8, 16, dtype=F64)
    index = SpanIndex()
    target = q[:, ::2, 3:4] * 4
    spans = [(at, at + 15) for at in range(0, 2048, 16)]
    a = torch.full((2048, 2048), 1e-3, dtype=F64)
    k[:, :, 1000:1001] = target
    a[:, 1000] = 1.0  # what matters in a span has received attention
    index.add(a, spans, k, v)

    def rank() -> float:
        order = index.scores(q).argsort(descending=True).tolist()
        return 1.0 + order.index(1000 // 16)

    found = rank()
    assert index.spans[1000 // 16] in index.retrieve(q, 2, 64) or found > 2
    for one in index.spans:
        one.static, one.hits = torch.zeros_like(one.static), 0
        one.hit = torch.zeros_like(one.hit)
    return found, rank()


@check(
    "ltri-llm",
    "12 chunks streamed: each output equals dense attention over sinks, retrieved spans and window, placed one after another",
    below=1e-10,
    control="positions of the text",
)
def _() -> tuple[float, float]:
    q, k, v = torch.randn(1, 4, 192, 16, dtype=F64), *torch.randn(2, 1, 2, 192, 16, dtype=F64)
    stream, rope = LtriStream(window=32, sinks=2, top=3, budget=24, rope=Rope()), Rope()
    own = other = 0.0
    for start in range(0, 192, 16):
        part = slice(start, start + 16)
        first = stream.first
        out = stream(q[:, :, part], k[:, :, part], v[:, :, part])
        kept = [*range(min(2, start)), *[t for s, e in stream.read for t in range(s, e + 1)], *range(first, start + 16)]
        gaps = []
        for places in (torch.arange(len(kept)), torch.tensor(kept)):
            keys, values = rope.rotate(k[:, :, kept], places), v[:, :, kept]
            s = rope.rotate(q[:, :, part], places[-16:]) @ keys.repeat_interleave(2, 1).transpose(-1, -2) / 4
            seen = torch.ones(16, len(kept), dtype=torch.bool).tril(len(kept) - 16)
            gaps.append(naive.gap(out, s.masked_fill(~seen, -math.inf).softmax(-1) @ values.repeat_interleave(2, 1)))
        own, other = max(own, gaps[0]), max(other, gaps[1])
    return own + max(0, stream.resident - (2 + 32 + 40 + 16)), other
