"""Checks of combiner."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import joined, misshapen, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.linear.combiner import CombinerAttention, combiner_attention


def fixed_matrix(q: Tensor, k: Tensor, size: int, causal: bool) -> Tensor:
    """The stochastic matrix of the fixed pattern, one row at a time."""
    n, d = q.shape
    rows = torch.zeros(n, n, dtype=q.dtype)
    segments = [torch.arange(a, min(a + size, n)) for a in range(0, n, size)]
    inside = [torch.softmax(k[s] @ (q[s].amax(0) * d**-0.5), 0) for s in segments]
    for i in range(n):
        mine = i // size
        near = [j for j in segments[mine].tolist() if not causal or j <= i]
        far = [s for s in range(len(segments)) if (s < mine if causal else s != mine)]
        logits = torch.cat((k[near] @ q[i], torch.stack([k[segments[s]].amax(0) @ q[i] for s in far]) if far else q.new_zeros(0))) * d**-0.5
        p = torch.softmax(logits, 0)
        rows[i, near] = p[: len(near)]
        for at, s in enumerate(far):
            rows[i, segments[s]] = p[len(near) + at] * inside[s]
    return rows


@check(
    "combiner",
    "fixed pattern, causal and not, N = 64 and 61, with v == its matrix row by row",
    below=1e-10,
    control="remote tokens left out",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for n in (64, 61):
        q, k, v = (x[:, :1] for x in qkv(n))
        for causal in (True, False):
            w = fixed_matrix(q[0, 0], k[0, 0], 8, causal)
            out = combiner_attention(q, k, v, "fixed", 8, causal)
            own.append(naive.gap(out, (w @ v[0, 0])[None, None]))
            at = torch.arange(n) // 8
            near = w * (at[:, None] == at)
            other = min(other, naive.gap(out, (near / near.sum(-1, keepdim=True) @ v[0, 0])[None, None]))
    return max(own), other


@check(
    "combiner",
    "all patterns: rows sum to 1, every allowed pair is positive, every other zero: the largest miss",
    below=1e-12,
    control="attention to the own segment alone",
)
def _() -> tuple[float, float]:
    past, own = torch.ones(48, 48).tril().bool(), []
    for pattern, size in (("fixed", 8), ("logsparse", None), ("axial", 6)):
        for causal in (True, False):
            layer = CombinerAttention(16, 2, pattern, size, causal).double()
            w = layer.implied_matrix(torch.randn(1, 48, 16, dtype=F64))
            allowed = past if causal else torch.ones_like(past)
            bad = float((w[..., allowed] <= 0).double().sum()) + float(w[..., ~allowed].abs().sum())
            own.append(max(bad, float((w.sum(-1) - 1).abs().max())))
    at = torch.arange(48) // 8
    q, k, _ = qkv(48)
    local = (q @ k.mT).masked_fill(~(past & (at[:, None] == at)), -math.inf).softmax(-1)
    return max(own), float((local[..., past] <= 0).double().sum())


@check("combiner", "one segment: exact causal softmax, and without a mask", below=1e-12, control="two segments")
def _() -> tuple[float, float]:
    q, k, v = qkv(48)
    truths = [attend(q, k, v, mask=Causal()), attend(q, k, v)]

    def miss(size: int) -> float:
        return max(
            naive.gap(combiner_attention(q, k, v, "fixed", size, causal), truth)
            for causal, truth in zip((True, False), truths, strict=True)
        )

    return miss(48), miss(24)


@check(
    "combiner",
    "logsparse: regions before i cover [0, i), each token once, by where weights of one region are proportional to its own softmax",
    below=1e-10,
    control="spans shifted by one",
)
def _() -> tuple[float, float]:
    q, k, _ = (x[:, :1] for x in qkv(37))
    w = combiner_attention(q, k, torch.eye(37, dtype=F64)[None, None], "logsparse")[0, 0]
    q, k = q[0, 0] * 8**-0.5, k[0, 0]

    def row(i: int, shift: int) -> Tensor:
        logits, spans, end = [q[i] @ k[i]], [], i
        for level in range(6):
            if i >> level & 1:
                spans.append((max(0, end - (1 << level) - shift), end - shift))
                end -= 1 << level
        spans = [s for s in spans if s[1] > s[0]]
        for a, b in spans:
            logits.append(q[i] @ k[a:b].amax(0))
        p, found = torch.softmax(torch.stack(logits), 0), torch.zeros(37, dtype=F64)
        found[i] = p[0]
        for at, (a, b) in enumerate(spans):
            found[a:b] += p[at + 1] * torch.softmax(k[a:b] @ q[a:b].amax(0), 0)
        return found

    return naive.gap(w, torch.stack([row(i, 0) for i in range(37)])), naive.gap(w, torch.stack([row(i, 1) for i in range(37)]))


@check(
    "combiner",
    "axial on 6 x 8 == own row, own column, summaries of the other columns' earlier rows",
    below=1e-10,
    control="columns counted with the own row",
)
def _() -> tuple[float, float]:
    q, k, _ = (x[:, :1] for x in qkv(48))
    w = combiner_attention(q, k, torch.eye(48, dtype=F64)[None, None], "axial", 8)[0, 0]
    q, k = q[0, 0] * 8**-0.5, k[0, 0]

    def row(i: int, extra: int) -> Tensor:
        r, c = divmod(i, 8)
        direct = [r * 8 + x for x in range(c + 1)] + [y * 8 + c for y in range(r)]
        regions = [[y * 8 + x for y in range(r + extra)] for x in range(8) if x != c and r + extra > 0]
        logits = torch.cat((k[direct] @ q[i], torch.stack([k[s].amax(0) @ q[i] for s in regions]) if regions else q.new_zeros(0)))
        p, found = torch.softmax(logits, 0), torch.zeros(48, dtype=F64)
        found[direct] = p[: len(direct)]
        for at, s in enumerate(regions):
            found[s] += p[len(direct) + at] * torch.softmax(k[s] @ q[s].amax(0), 0)
        return found

    return naive.gap(w, torch.stack([row(i, 0) for i in range(48)])), naive.gap(w, torch.stack([row(i, 1) for i in range(48)]))


def regions_of(pattern: str, i: int, n: int, size: int, causal: bool) -> tuple[list[int], list[list[int]]]:
    """(tokens that i reads directly, the regions that it reads by a summary)."""
    if pattern == "fixed":
        segments = [list(range(a, min(a + size, n))) for a in range(0, n, size)]
        mine = i // size
        direct = [j for j in segments[mine] if j <= i or not causal]
        return direct, [s for at, s in enumerate(segments) if (at < mine if causal else at != mine)]
    if pattern == "axial":
        r, c = divmod(i, size)
        rows = [y for y in range(n // size) if (y < r if causal else y != r)]
        direct = [r * size + x for x in range(size) if x <= c or not causal] + [y * size + c for y in rows]
        return direct, [[y * size + x for y in rows] for x in range(size) if x != c and rows]
    regions, left, right = [], i, i + 1
    for level in range(n.bit_length()):
        if left >> level & 1:
            regions.append(list(range(left - (1 << level), left)))
            left -= 1 << level
        if not causal and right < n and right >> level & 1:
            regions.append(list(range(right, min(n, right + (1 << level)))))
            right += 1 << level
    return [i], regions


@check(
    "combiner",
    "every pattern, both directions, keys and queries of regions by maximum, mean and sum, another scale == one softmax a row, in loops",
    below=1e-10,
    control="summaries of uniform weights",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    pools = {"max": lambda x: x.amax(0), "mean": lambda x: x.mean(0), "sum": lambda x: x.sum(0)}
    for pattern, n, size in (("fixed", 22, 5), ("logsparse", 21, 1), ("axial", 24, 6)):
        q, k, v = (x[:, :1] for x in qkv(n))
        for causal in (True, False):
            for pool, pooled in pools.items():
                rows = torch.zeros(2, n, n, dtype=F64)  # with a softmax inside regions, and without
                a, b = 0.2 * q[0, 0], k[0, 0]
                for i in range(n):
                    direct, regions = regions_of(pattern, i, n, size, causal)
                    logits = [b[j] @ a[i] for j in direct] + [pooled(b[s]) @ a[i] for s in regions]
                    p = torch.softmax(torch.stack(logits), 0)
                    rows[:, i, direct] = p[: len(direct)]
                    for at, s in enumerate(regions):
                        inside = torch.softmax(b[s] @ pooled(a[s]), 0)
                        rows[0, i, s], rows[1, i, s] = p[len(direct) + at] * inside, p[len(direct) + at] / len(s)
                out = combiner_attention(q, k, v, pattern, None if pattern == "logsparse" else size, causal, pool, 0.2)
                own.append(naive.gap(out, rows[:1, None] @ v))
                other = min(other, naive.gap(out, rows[1:, None] @ v))
    return max(own), other


@check(
    "combiner",
    "the layer == its projections around the default: segments of round(sqrt N), a scale of D^-1/2",
    below=1e-10,
    control="segments of 3",
)
def _() -> tuple[float, float]:
    layer, x = CombinerAttention(16, 2).double(), torch.randn(2, 30, 16, dtype=F64)
    q, k, v = (split(x @ w.T, 2) for w in layer.qkv.weight.chunk(3))

    def truth(size: int) -> Tensor:
        rows = torch.stack([torch.stack([fixed_matrix(q[b, h], k[b, h], size, True) for h in range(2)]) for b in range(2)])
        return joined(rows @ v) @ layer.out.weight.T

    shapes: dict[str, tuple[int, ...]] = {"qkv.weight": (48, 16), "out.weight": (16, 16)}
    return max(misshapen(layer, shapes), naive.gap(layer(x), truth(5))), naive.gap(layer(x), truth(3))
