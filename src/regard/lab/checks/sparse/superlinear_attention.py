"""Checks of superlinear-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import rotary, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.superlinear_attention import (
    SuperlinearAttention,
    anchors_of,
    covered,
    span_attention,
    span_of,
    span_search,
    window_size,
)


@check(
    "superlinear-attention",
    "window and candidate spans reach every key, t < 1024, s = 0 and 3, beta = 2; anchors <= sqrt(t + 1): queries that miss some",
    below=0,
    control="beta = 1",
)
def _() -> tuple[float, float]:
    def missed(beta: float) -> float:
        return float(
            sum(
                covered(t, s, beta) != set(range(t + 1)) or len(anchors_of(t, s)) > math.isqrt(t + 1)
                for s in (0, 3)
                for t in range(0, 1024, 7)
            )
        )

    return missed(2.0), missed(1.0)


def superlinear_rows(
    search: Tensor, q: Tensor, k: Tensor, v: Tensor, top: int, skip: int, beta: float, phi: float, gated: bool = True,
    power: float = 2.0, span_power: float = 0.5,
) -> Tensor:  # fmt: skip
    """One head, one query after the other, by the rules."""
    rows = []
    for t in range(q.shape[0]):
        squares = [math.floor(i**power + 1e-9) for i in range(skip + 1, skip + t + 4)]
        anchors = [t - square + 1 for square in squares if square <= t + 1]
        width = max(1, squares[0] - 1)
        window = list(range(max(0, t - width + 1), t + 1))
        scores = torch.stack([search[t] @ k[a] for a in anchors]) if anchors else torch.zeros(0, dtype=q.dtype)
        best = scores.topk(min(top, len(anchors))).indices.tolist()
        if not best:
            rows.append((k[window] @ q[t] / math.sqrt(q.shape[1])).softmax(0) @ v[window])
            continue
        gates = scores[best].softmax(0) if gated else torch.full((len(best),), 1 / len(best), dtype=q.dtype)
        total = torch.zeros_like(v[0])
        for g, c in zip(gates, best, strict=True):
            start = max(0, anchors[c] - math.ceil(beta * (t + 1) ** span_power - 1e-9))
            end = min(anchors[c] + math.ceil(phi * (t + 1) ** span_power - 1e-9), t - width)
            keys = list(range(start, end + 1)) + window
            total = total + g * ((k[keys] @ q[t] / math.sqrt(q.shape[1])).softmax(0) @ v[keys])
        rows.append(total)
    return torch.stack(rows)


@check(
    "superlinear-attention",
    "L = 200, m = 2: equals a row loop with gradients of all four, and cached decoding",
    below=1e-10,
    control="spans weighed alike",
)
def _() -> tuple[float, float]:
    leaves = [torch.randn(200, 16, dtype=F64, requires_grad=True) for _ in range(4)]
    search, q, k, v = leaves
    seed = torch.randn(200, 16, dtype=F64)

    def run() -> Tensor:
        at = [x[None, None] for x in leaves]
        anchors, scores = span_search(at[0], at[2], 0, 2, 3)
        return span_attention(*at[1:], anchors, scores, 0, 3, 2.0, 0.5, 0.5, 2.0)[0, 0]

    out, truth = run(), superlinear_rows(search, q, k, v, 2, 3, 2.0, 0.5)
    own = max(
        naive.gap(out, truth),
        *(naive.gap(a, b) for a, b in zip(*(torch.autograd.grad((y * seed).sum(), leaves) for y in (out, truth)), strict=True)),
    )
    with torch.no_grad():
        for skip, power, spans, phi, top in ((0, 2.0, 0.5, 1.0, 3), (1, 1.5, 0.6, 0.0, 1), (2, 2.3, 0.4, 0.7, 2)):
            at = [y[None, None, :90] for y in leaves]
            found = span_attention(*at[1:], *span_search(at[0], at[2], 0, top, skip, power), 0, skip, 1.3, phi, spans, power)[0, 0]
            rows = superlinear_rows(*(y[:90] for y in leaves), top, skip, 1.3, phi, True, power, spans)
            own = max(own, naive.gap(found, rows))
            ends = [(span_of(t, a, skip, 1.3, phi, spans, power), t) for t in range(90) for a in anchors_of(t, skip, power)]
            own += float(any(start < 0 or end > t - window_size(skip, power) for (start, end), t in ends))
    layer = SuperlinearAttention(16, 2, 1).double()
    x = torch.randn(1, 60, 16, dtype=F64)
    with torch.no_grad():
        state, outs = None, []
        for t in range(60):
            y, state = layer.step(x[:, t : t + 1], state)
            outs.append(y)
        own = max(own, naive.gap(torch.cat(outs, 1), layer(x)))
        long = torch.randn(1, 530, 16, dtype=F64)  # more queries than are worked on at a time
        early, state = layer.step(long[:, :300])
        whole = layer(long)
        own += abs(whole.shape[1] - 530)
        own = max(own, naive.gap(torch.cat((early, layer.step(long[:, 300:], state)[0]), 1), whole))
    return own, naive.gap(out, superlinear_rows(search, q, k, v, 2, 3, 2.0, 0.5, False))


@check(
    "superlinear-attention",
    "a needle 1,600 tokens back, near an anchor that the search hits: cosine to its value",
    above=0.99,
    control="a window of as many keys",
)
def _() -> tuple[float, float]:
    d, t = 32, 1999
    k, v = math.sqrt(0.1) * torch.randn(2000, d, dtype=F64), torch.randn(2000, d, dtype=F64)
    far = t - 40**2 + 1
    needle = far - 10
    axes = torch.eye(d, dtype=F64)
    k[far], k[needle] = 4 * axes[0], 4 * axes[1]
    search, q = 6 * axes[0], 40 * axes[1]
    anchors, scores = span_search(search[None, None, None], k[None, None], t, 2, 3)
    out = span_attention(q[None, None, None], k[None, None], v[None, None], anchors, scores, t, 3, 2.0, 0.0, 0.5, 2.0)[0, 0, 0]
    count = window_size(3) + 2 * (math.ceil(2 * 2000**0.5) + 1)
    window = attend(q[None, None, None], k[None, None, -count:], v[None, None, -count:])[0, 0, 0]
    return tuple(float(torch.cosine_similarity(x, v[needle], 0)) for x in (out, window))  # type: ignore[return-value]


@check(
    "superlinear-attention",
    "the layer from its weights: search queries of their own, rotary positions, shared keys; the search's gradient by finite differences",
    below=1e-5,
    control="queries in place of search queries",
)
def _() -> tuple[float, float]:
    x, gaps = torch.randn(1, 70, 16, dtype=F64), [0.0, 0.0]
    layer = SuperlinearAttention(16, 2, 1, top=2, skip=1, backward=1.0, forward=0.5).double()
    at = torch.arange(70)
    with torch.no_grad():
        for own in (0, 1):
            maps = (layer.q if own else layer.search, layer.q, layer.k)
            search, q, k = (rotary(split_heads(x @ m.weight.T, heads), at)[0] for m, heads in zip(maps, (2, 2, 1), strict=True))
            v = x[0] @ layer.v.weight.T
            heads = [superlinear_rows(search[h], q[h], k[0], v, 2, 1, 1.0, 0.5) for h in range(2)]
            gaps[own] = naive.gap(layer(x)[0], torch.cat(heads, -1) @ layer.out.weight.T)
    seed = torch.randn(1, 70, 16, dtype=F64)
    (layer(x) * seed).sum().backward()
    grad, flat = layer.search.weight.grad, layer.search.weight.data.view(-1)
    assert grad is not None
    worst, size = 0.0, float(grad.abs().max())
    with torch.no_grad():
        for n in range(0, 256, 37):
            values = []
            for sign in (1, -1):
                flat[n] += sign * 1e-6
                values.append(float((layer(x) * seed).sum()))
                flat[n] -= sign * 1e-6
            worst = max(worst, abs((values[0] - values[1]) / 2e-6 - float(grad.view(-1)[n])))
    return max(gaps[0], worst) if size > 1e-3 else math.inf, gaps[1]
