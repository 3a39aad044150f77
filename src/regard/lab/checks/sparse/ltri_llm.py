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
from regard.zoo.sparse.ltri_llm import LtriStream, Span, SpanIndex, compactness, find_spans, leaks, triangle_mass


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


@check(
    "ltri-llm",
    "leaks and scores equal double sums; the best span of a map comes first and no span overlaps an earlier one by more than a tenth",
    below=1e-10,
    control="leaks of every later row",
)
def _() -> tuple[float, float]:
    a = torch.rand(26, 26, dtype=F64).tril()
    a = a / a.sum(-1, keepdim=True)

    def leak(s: int, e: int, rows: int) -> float:
        after = range(e + 1, min(26, e + 1 + rows))
        return sum(float(a[t, s : e + 1].sum()) for t in after) / len(after) if after else 0.0

    own = other = 0.0
    found, value = leaks(a), {}
    for s in range(26):
        for e in range(s, 26):
            own, other = max(own, abs(float(found[s, e]) - leak(s, e, 8))), max(other, abs(float(found[s, e]) - leak(s, e, 26)))
            size, mass = e - s + 1, sum(float(a[t, c]) for t in range(s, e + 1) for c in range(s, t + 1))
            value[s, e] = mass / size - leak(s, e, 8) - 0.004 * size
            told = compactness(torch.tensor(mass), torch.tensor(leak(s, e, 8)), torch.tensor(size))
            own = max(own, abs(float(told) - value[s, e]) if abs(float(told) - value[s, e]) > 1e-6 else 0.0)
    allowed = {span: x for span, x in value.items() if 4 <= span[1] - span[0] + 1 <= 10}
    taken: list[Span] = []
    for span in sorted(allowed, key=lambda span: -allowed[span]):
        free = [t for t in range(span[0], span[1] + 1) if not any(s <= t <= e for s, e in taken)]
        inter = [len(set(range(span[0], span[1] + 1)) & set(range(s, e + 1))) for s, e in taken]
        union = [max(span[1], e) - min(span[0], s) + 1 for s, e in taken]
        if free and all(x <= 0.1 * y for x, y in zip(inter, union, strict=True)):
            taken.append((free[0], free[-1]))
    return own + float(not set(taken) <= set(find_spans(a, 4, 10))), other


@check(
    "ltri-llm",
    "an index by hand: vectors weighted by received attention and moved by the queries that hit, votes of heads, budgets, residents",
    below=1e-10,
    control="votes of all heads",
)
def _() -> tuple[float, float]:
    q, k, v, a = torch.randn(2, 4, 5, 8, dtype=F64), *torch.randn(2, 2, 2, 30, 8, dtype=F64), torch.rand(30, 30, dtype=F64).tril()
    spans = [(0, 5), (6, 9), (10, 19), (20, 29)]
    index = SpanIndex(heads=[1, 2], resident_after=2)
    index.add(a, spans, k, v, first=100)
    vectors = []
    for s, e in spans:
        weight = torch.stack([a[s : e + 1, c].sum() for c in range(s, e + 1)])
        vectors.append((k[:, :, s : e + 1] * (weight / weight.sum())[:, None]).sum(2))
    hits, sums, own = [0] * 4, [torch.zeros(2, 2, 8, dtype=F64) for _ in spans], 0.0

    def votes(heads: list[int]) -> list[float]:
        found = []
        for n, vector in enumerate(vectors):
            moved = vector + sums[n] / max(1, hits[n])
            tops = [float((q[b, h] @ moved[b, h // 2]).max()) for b in range(2) for h in heads]
            found.append(sum(tops) / len(tops))
        return found

    other = max(abs(x - y) for x, y in zip(index.scores(q).tolist(), votes([0, 1, 2, 3]), strict=True))
    for step in range(5):
        q = torch.randn(2, 4, 5, 8, dtype=F64)
        mine = votes([1, 2])
        own = max(own, *(abs(x - y) for x, y in zip(index.scores(q).tolist(), mine, strict=True)))
        order = sorted(range(4), key=lambda n, mine=mine: -mine[n])
        resident = [n for n in order if hits[n] >= 2]
        room, chosen = 18, []
        for n in [*resident, *[n for n in order if n not in resident][: 1 + step % 2]]:
            if spans[n][1] - spans[n][0] + 1 <= room:
                chosen.append(n)
                room -= spans[n][1] - spans[n][0] + 1
        got = index.retrieve(q, 1 + step % 2, 18)
        own += [one.span for one in got] != [(spans[n][0] + 100, spans[n][1] + 100) for n in sorted(chosen)]
        own = max(
            own,
            *(
                naive.gap(one.k, k[:, :, s : e + 1]) + naive.gap(one.v, v[:, :, s : e + 1])
                for one in got
                for s, e in [(one.span[0] - 100, one.span[1] - 100)]
            ),
        )
        mean = torch.stack([q[:, 2 * g : 2 * g + 2].mean((1, 2)) for g in range(2)], 1)
        for n in chosen:
            hits[n], sums[n] = hits[n] + 1, sums[n] + mean
    return own, other
