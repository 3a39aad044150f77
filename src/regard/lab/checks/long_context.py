"""Checks of layers for long contexts: landmarks, superlinear spans, recurrent memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import gradcheck

from ...algebra import Causal, Rope
from ...engine import attend
from ...nn.landmark import LandmarkAttention, LandmarkCache, grouped_softmax, with_landmarks
from ...nn.recurrent_memory import RecurrentMemoryBlock
from ...nn.superlinear import SuperlinearAttention, anchors_of, covered, span_attention, span_of, span_search, window_size
from .. import naive
from ..verification import check

F64 = torch.float64


def grouped_loop(s: Tensor, block: int) -> Tensor:
    """One head's weights (L, L), row by row from the groups."""
    length, size = s.shape[-1], block + 1
    out = torch.zeros_like(s)
    for i in range(length):
        cur = i // size
        own = [j for j in range(cur * size, i + 1) if j % size != block]
        marks = [b * size + block for b in range(cur)]
        if not own + marks:
            continue
        p0 = s[i, own + marks].softmax(0)
        out[i, own] = p0[: len(own)]
        for b in range(cur):
            inside = list(range(b * size, b * size + block))
            out[i, inside] = p0[len(own) + b] * s[i, inside].softmax(0)
    return out


@check(
    "landmark-attention",
    "4 blocks of 7 + 1: weights equal a loop, rows sum to one, landmarks weigh nothing, gradcheck",
    below=1e-12,
    control="one softmax over all tokens",
)
def _() -> tuple[float, float]:
    s = torch.randn(2, 32, 32, dtype=F64, requires_grad=True)
    p = grouped_softmax(s, 7)
    truth = torch.stack([grouped_loop(x, 7) for x in s])
    whole = float((p.sum(-1) - 1).abs().max() + p[..., 7::8].abs().max())
    good = gradcheck(lambda x: grouped_softmax(x, 7), (s[:1].detach().requires_grad_(),), raise_exception=False)
    plain = s.masked_fill(~torch.ones(32, 32, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    return naive.gap(p, truth) + whole if good else math.inf, naive.gap(plain, truth)


@check(
    "landmark-attention",
    "landmark logits set to their block's log-sum-exp give the softmax over ordinary tokens",
    below=1e-10,
    control="landmark logits as they are",
)
def _() -> tuple[float, float]:
    s = torch.randn(2, 32, 32, dtype=F64)
    set_to = s.clone()
    for b in range(4):
        set_to[..., b * 8 + 7] = s[..., b * 8 : b * 8 + 7].logsumexp(-1)
    ordinary = torch.ones(32, 32, dtype=torch.bool).tril() & (torch.arange(32) % 8 != 7)
    truth = s.masked_fill(~ordinary, -math.inf).softmax(-1)
    return naive.gap(grouped_softmax(set_to, 7), truth), naive.gap(grouped_softmax(s, 7), truth)


@check(
    "landmark-attention",
    "cached steps that retrieve all blocks equal the full pass, with rotary positions too",
    below=1e-10,
    control="one block retrieved",
)
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 37, 16, dtype=F64), {4: 0.0, 1: 0.0}
    with torch.no_grad():
        for rope in (False, True):
            for top in gaps:
                torch.manual_seed(0)
                layer = LandmarkAttention(16, 2, block=7, rope=rope, top_blocks=top).double()
                cache, outs = LandmarkCache(), []
                for t in range(37):
                    out, cache = layer.step(x[:, t : t + 1], cache)
                    outs.append(out)
                gaps[top] = max(gaps[top], naive.gap(torch.cat(outs, 1), layer(x)))
    return gaps[4], gaps[1]


@check(
    "landmark-attention",
    "one block retrieved: weight outside the own block and the block of the highest landmark logit",
    below=0,
    control="two blocks",
)
def _() -> tuple[float, float]:
    s = torch.randn(1, 37, dtype=F64)
    best = s[0, 7:32:8].argsort(descending=True)

    def outside(count: int) -> float:
        opened = torch.zeros(1, 5, dtype=torch.bool)
        opened[0, best[:count]] = True
        p = grouped_softmax(s, 7, 36, opened)[0]
        return float(p.sum() - p[32:].sum() - p[int(best[0]) * 8 : int(best[0]) * 8 + 7].sum())

    return max(0.0, outside(1) - 1e-15), outside(2)


@check("landmark-attention", "landmark ids follow every 3 tokens: tokens out of place", below=0, control="every 4")
def _() -> tuple[float, float]:
    tokens = torch.arange(1, 8)[None]
    truth = torch.tensor([[1, 2, 3, 0, 4, 5, 6, 0, 7]])
    found = [with_landmarks(tokens, block, 0) for block in (3, 4)]
    return float((found[0] != truth).sum()), float(abs(found[1].shape[1] - 9))


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
    search: Tensor, q: Tensor, k: Tensor, v: Tensor, top: int, skip: int, beta: float, phi: float, gated: bool = True
) -> Tensor:
    """One head, one query after the other, by the rules."""
    rows = []
    for t in range(q.shape[0]):
        anchors = anchors_of(t, skip)
        window = list(range(max(0, t - window_size(skip) + 1), t + 1))
        scores = torch.stack([search[t] @ k[a] for a in anchors]) if anchors else torch.zeros(0, dtype=q.dtype)
        best = scores.topk(min(top, len(anchors))).indices.tolist()
        if not best:
            rows.append((k[window] @ q[t] / math.sqrt(q.shape[1])).softmax(0) @ v[window])
            continue
        gates = scores[best].softmax(0) if gated else torch.full((len(best),), 1 / len(best), dtype=q.dtype)
        total = torch.zeros_like(v[0])
        for g, c in zip(gates, best, strict=True):
            start, end = span_of(t, anchors[c], skip, beta, phi)
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
    layer = SuperlinearAttention(16, 2, 1).double()
    x = torch.randn(1, 60, 16, dtype=F64)
    with torch.no_grad():
        state, outs = None, []
        for t in range(60):
            y, state = layer.step(x[:, t : t + 1], state)
            outs.append(y)
        own = max(own, naive.gap(torch.cat(outs, 1), layer(x)))
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
    "recurrent-memory-transformer",
    "token by token equals the chunked pass, L = 70, C = 16, M = 4, with and without the global branch",
    below=1e-10,
    control="memory held back a chunk",
)
def _() -> tuple[float, float]:
    own, x = 0.0, torch.randn(2, 70, 16, dtype=F64)
    with torch.no_grad():
        for use_global in (False, True):
            layer = RecurrentMemoryBlock(16, 2, chunk=16, slots=4, use_global=use_global).double()
            state, outs = None, []
            for t in range(70):
                out, state = layer.step(x[:, t : t + 1], state)
                outs.append(out)
            whole = layer(x)
            assert isinstance(whole, Tensor)
            own = max(own, naive.gap(torch.cat(outs, 1), whole))
        alone = torch.cat([layer(part) for part in x.split(16, 1)], 1)
    return own, naive.gap(alone, whole)


def influence(open_gate: bool, slots: int, chunk: int) -> float:
    """How much a token of chunk 0 moves the outputs of a later chunk (C = 8, local branch alone)."""
    torch.manual_seed(0)
    layer = RecurrentMemoryBlock(16, 2, chunk=8, slots=slots).double()
    torch.nn.init.zeros_(layer.gate.weight)
    torch.nn.init.constant_(layer.gate.bias, 30.0 if open_gate else -40.0)
    x = torch.randn(1, 64, 16, dtype=F64)
    moved = x.clone()
    moved[:, 3] += 1
    with torch.no_grad():
        a, b = layer(x), layer(moved)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return naive.gap(a[:, chunk * 8 : chunk * 8 + 8], b[:, chunk * 8 : chunk * 8 + 8])


@check(
    "recurrent-memory-transformer",
    "a token of chunk 0 moves chunk 2 only through open memory: largest move with M = 0 or the gate shut",
    below=1e-12,
    control="M = 3, gate open",
)
def _() -> tuple[float, float]:
    return max(influence(True, 0, 2), influence(False, 3, 2)), influence(True, 3, 2)


@check(
    "recurrent-memory-transformer",
    "after M more chunks its slot is gone (gate 1): the move of chunk 4 with M = 3",
    below=1e-10,
    control="chunk 3",
)
def _() -> tuple[float, float]:
    return influence(True, 3, 4), influence(True, 3, 3)


@check(
    "recurrent-memory-transformer",
    "M = 0 and C >= L is causal attention with rotary positions a head",
    below=1e-12,
    control="one base for all heads",
)
def _() -> tuple[float, float]:
    layer, x = RecurrentMemoryBlock(16, 2, chunk=64, slots=0).double(), torch.randn(2, 40, 16, dtype=F64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)

    def run(bases: tuple[float, float]) -> Tensor:
        at = torch.arange(40)
        turned = [torch.cat([Rope(base=base).rotate(y[:, h : h + 1], at) for h, base in enumerate(bases)], 1) for y in (q, k)]
        return layer.out(attend(*turned, v, mask=Causal()).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    y = layer(x)
    assert isinstance(y, Tensor)
    return naive.gap(y, run((1e3, 1e5))), naive.gap(y, run((1e4, 1e4)))
