"""Checks of sparse attention over chunks that follow the text: DHSA, Ltri-LLM."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import torch
from torch import Tensor

from ...algebra import Causal, Rope
from ...catalog import get
from ...engine import attend
from ...mechanisms.selected.dhsa import BoundaryPredictor, boundary_loss, choose_boundaries, chunk_keys, mass_ratio, selected_tokens
from ...mechanisms.selected.ltri import LtriStream, SpanIndex
from ...mechanisms.selected.text_spans import Span, find_spans, triangle_mass
from .. import naive
from ..verification import check

F64 = torch.float64


@check(
    "dhsa",
    "chunks of 4 to 256 iid keys: largest over smallest deviation of the scores, less 1",
    below=0.1,
    control="plain means",
)
def _() -> tuple[float, float]:
    q, found = torch.randn(16, dtype=F64), []
    for size in (4, 16, 64, 256):
        k = torch.randn(1, 1, 2000 * size, 16, dtype=F64)
        s = chunk_keys(k, torch.arange(2000).repeat_interleave(size)[None])[0] @ q
        found.append((float(s.std()), float((s / math.sqrt(size)).std())))
    return tuple(max(x) / min(x) - 1 for x in zip(*found, strict=True))  # type: ignore[return-value]


def tokens_loop(q: Tensor, k: Tensor, starts: list[int], budget: int, block: int, local: int) -> Tensor:
    """(blocks, L) bool for one batch entry, tokens one after another."""
    length, edges = k.shape[1], [*starts, k.shape[1]]
    mean_q, mean_k = q.mean(0), k.mean(0)
    keep = torch.zeros(-(-length // block), length, dtype=torch.bool)
    for u in range(len(keep)):
        rows = mean_q[u * block : (u + 1) * block]
        query = rows.sum(0) / math.sqrt(len(rows))
        end = min((u + 1) * block, length)
        s = torch.zeros(length, dtype=F64)
        for first, last in pairwise(edges):
            score = query @ (mean_k[first:last].sum(0) / math.sqrt(last - first))
            for j in range(first, last):
                s[j] = score
        chosen = list(range(max(0, end - min(local, budget)), end))
        rest = sorted((j for j in range(end) if j not in chosen), key=lambda j: (-float(s[j]), j))
        keep[u, chosen + rest[: budget - len(chosen)]] = True
    return keep


@check(
    "dhsa",
    "ragged borders, 512 tokens: chosen tokens equal loops (differing tokens), and a budget of all is dense attention",
    below=1e-10,
    control="borders one token late",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 512, 16, dtype=F64) for _ in range(3))
    borders = [0, *sorted(random.Random(0).sample(range(1, 512), 30))]
    starts = torch.zeros(1, 512, dtype=F64)
    starts[0, borders] = 1
    late = starts.roll(1, 1)
    truth = tokens_loop(q[0], k[0], borders, 128, 32, 64)
    wrong = []
    for given in (starts, late):
        keep = selected_tokens(q, k, 0, given, 128, 32, 64, 0, 16, "cosine")
        assert keep is not None
        wrong.append(float((keep[0] != truth).sum()))
    dense = naive.gap(attend(q, k, v, get("dhsa", budget=512), starts=starts), attend(q, k, v, mask=Causal()))
    sparse = attend(q, k, v, get("dhsa", budget=128), starts=starts)
    seen = truth.repeat_interleave(32, 0) & torch.ones(512, 512, dtype=torch.bool).tril()
    return wrong[0] + dense + naive.gap(sparse, attend(q, k, v, mask=seen)), wrong[1]


@check("dhsa", "the mass ratio of every gap equals loops over rows and keys", below=1e-9, control="rows counted from the gap on")
def _() -> tuple[float, float]:
    p = torch.randn(1, 2, 40, 40, dtype=F64).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    a, truth = p[0].mean(0), [[], []]  # type: ignore[var-annotated]
    for n, late in enumerate((4, 1)):
        for t in range(40):
            past = sum(float(a[i, j]) for i in range(t + late, 40) for j in range(max(0, t - 3), t + 1))
            future = sum(float(a[i, j]) for i in range(t + late, 40) for j in range(t + 1, min(40, t + 5)))
            truth[n].append((max(past, future) + 1e-6) / (min(past, future) + 1e-6))
    found = mass_ratio(p)[0]
    scale = torch.tensor(truth, dtype=F64)
    return tuple(float(((found - x) / x).abs().max()) for x in scale)  # type: ignore[return-value]


@check(
    "dhsa",
    "a predictor trained on 16 planted texts finds borders of 8 new ones within two tokens: share found",
    above=0.8,
    control="the untrained predictor",
)
def _() -> tuple[float, float]:
    draw, topics = random.Random(0), torch.randn(6, 16)

    def text() -> tuple[Tensor, Tensor, list[int]]:
        borders, at = [], 0
        while (at := at + draw.randint(12, 24)) < 128:
            borders.append(at)
        segment = torch.zeros(128, dtype=torch.long)
        segment[borders] = 1
        segment = segment.cumsum(0)
        order = torch.tensor([n % 6 for n in range(len(borders) + 1)]) + draw.randint(0, 5)
        keys = topics[order[segment] % 6] + 0.3 * torch.randn(128, 16)
        same = (segment[:, None] == segment).float().tril()
        late = same + 0.02 * torch.ones(128, 128).tril()
        return keys[None], mass_ratio((late / late.sum(-1, keepdim=True))[None, None])[0], borders

    train, test = [text() for _ in range(16)], [text() for _ in range(8)]
    predictor = BoundaryPredictor(16, hidden=32)

    def found() -> float:
        share = []
        for keys, _, borders in test:
            starts = choose_boundaries(predictor(keys), -math.inf, len(borders))[0].nonzero().flatten().tolist()
            share += [any(abs(at - other) <= 2 for other in starts) for at in borders]
        return sum(share) / len(share)

    before = found()
    optimizer = torch.optim.Adam(predictor.parameters(), 3e-3)
    keys, ratios = torch.cat([x[0] for x in train]), torch.stack([x[1] for x in train])
    for _ in range(150):
        optimizer.zero_grad()
        boundary_loss(predictor(keys), ratios).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found(), before


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
