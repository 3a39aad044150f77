"""Checks of nats."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Window
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import masked_softmax, qkv
from regard.lab.verification import check
from regard.zoo.sparse.nats import GLOBAL, LOCAL, MASKED, SLIDING, NAtSAttention, NAtSCache, cache_size, surrogate, type_lifetimes


@check(
    "nats",
    "masked form equals a loop over the three lifetimes, and the surrogate with one-hot types",
    below=1e-12,
    control="local tokens dropped one step early",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(2, 2, 96, 8, dtype=F64) for _ in range(3))
    types = torch.randint(3, (2, 2, 96))
    types[0, 0][types[0, 0] == GLOBAL] = LOCAL

    def loop(early: int) -> Tensor:
        keep = torch.zeros(2, 2, 96, 96, dtype=torch.bool)
        for b in range(2):
            for h in range(2):
                for j in range(96):
                    following = next((g for g in range(j, 96) if types[b, h, g] == GLOBAL), 96)
                    for i in range(j, 96):
                        kind = int(types[b, h, j])
                        keep[b, h, i, j] = (
                            kind == GLOBAL or (kind == LOCAL and (i <= following - early or i == j)) or (kind == SLIDING and i <= j + 8)
                        )
        return (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~keep, -math.inf).softmax(-1) @ v

    out = attend(q, k, v, MASKED, until=type_lifetimes(types, 8))
    soft = surrogate(q, k, v, F.one_hot(types, 3).to(F64), 8)
    return max(naive.gap(out, loop(0)), naive.gap(soft, loop(0))), naive.gap(out, loop(1))


@check(
    "nats",
    "decoding with the evicting cache equals the masked form, its sizes the formula's, grouped heads",
    below=1e-10,
    control="a cache that keeps everything",
)
def _() -> tuple[float, float]:
    layer = NAtSAttention(32, 4, 2, window=8).double().eval()
    x = torch.randn(2, 96, 32, dtype=F64)
    with torch.no_grad():
        whole, _ = layer(x)
        types = layer.heads_of(x)[3].argmax(-1)
        expected, cache, outs, wrong = cache_size(types, 8), NAtSCache([], [], [], []), [], 0
        for t in range(96):
            out, cache = layer.step(x[:, t : t + 1], cache)
            outs.append(out)
            wrong += sum(a != b for a, b in zip(cache.sizes(), expected[..., t].flatten().tolist(), strict=True))
    return naive.gap(torch.cat(outs, 1), whole) + wrong, float(96 * 4 - sum(cache.sizes()))


@check("nats", "all tokens global is dense causal attention, all sliding a window of W + 1 keys", below=1e-12, control="a window of W")
def _() -> tuple[float, float]:
    q, k, v = qkv(96)
    every = torch.zeros(1, 2, 96, dtype=torch.long)
    dense = naive.gap(attend(q, k, v, MASKED, until=type_lifetimes(every + GLOBAL, 8)), attend(q, k, v, mask=Causal()))
    sliding = attend(q, k, v, MASKED, until=type_lifetimes(every + SLIDING, 8))
    gaps = [naive.gap(sliding, attend(q, k, v, mask=Causal() & Window(size))) for size in (9, 8)]
    return max(dense, gaps[0]), gaps[1]


@check("nats", "gradients of the surrogate in soft types equal finite differences", below=1e-5, control="types detached")
def _() -> tuple[float, float]:
    q, k, v = qkv(24, 8, 1)
    logits, seed = torch.randn(1, 1, 24, 3, dtype=F64, requires_grad=True), torch.randn(1, 1, 24, 8, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        return (surrogate(q, k, v, x.softmax(-1), 4) * seed).sum()

    (grad,) = torch.autograd.grad(loss(logits), logits)
    slopes = torch.zeros_like(grad)
    for at in range(72):
        bump = torch.zeros(72, dtype=F64)
        bump[at] = 1e-6
        bump = bump.reshape(grad.shape)
        slopes.view(-1)[at] = (loss(logits + bump) - loss(logits - bump)).detach() / 2e-6
    return naive.gap(grad, slopes), float(slopes.abs().max())


def expected_share(y: list[list[float]], window: int) -> float:
    """The regulariser of one head's types (L, 3): global tokens stay for good, local ones a segment, sliding ones a window; over L."""
    n = len(y)
    segment = 1 / max(sum(row[GLOBAL] for row in y) / n, 1 / n)
    return sum(row[GLOBAL] + row[LOCAL] * segment / n + row[SLIDING] * min(window, n) / n for row in y) / n


@check(
    "nats",
    "the layer from its weights: types by argmax, or drawn by Gumbel noise with straight-through gradients in training; the expected share; cache sizes",
    below=1e-10,
    control="types of the other phase",
)
def _() -> tuple[float, float]:
    layer, x = NAtSAttention(24, 4, 2, window=5, tau=0.7).double(), torch.randn(1, 40, 24, dtype=F64)
    q = split_heads(x @ layer.q.weight.T, 4)
    k, v = (split_heads(x @ m.weight.T, 2).repeat_interleave(2, 1) for m in (layer.k, layer.v))
    logits = torch.stack((x @ layer.types.weight.T + layer.types.bias).chunk(2, -1), 1)  # (B, Hkv, L, 3)

    def by_hand(types: Tensor) -> Tensor:
        keep = torch.zeros(2, 40, 40, dtype=torch.bool)
        for h in range(2):
            for j in range(40):
                kind = int(types[0, h, j])
                last = {GLOBAL: 40, LOCAL: next((g for g in range(j, 40) if types[0, h, g] == GLOBAL), 40), SLIDING: j + 5}[kind]
                keep[h, j : last + 1, j] = True
        return join_heads(masked_softmax(q, k, v, keep.repeat_interleave(2, 0))) @ layer.out.weight.T

    best = logits.argmax(-1)
    y, share = layer.eval()(x)
    shares = [expected_share(F.one_hot(best[0, h], 3).tolist(), 5) for h in range(2)]
    own = max(naive.gap(y, by_hand(best)), abs(float(share) - sum(shares) / 2))
    long = NAtSAttention(24, 4, 2, window=90).double().eval()  # a window longer than the sequence counts as its length
    own = max(own, abs(float(long(x)[1].detach()) - sum(expected_share(F.one_hot(t, 3).tolist(), 90) for t in types_of(long, x)) / 2))

    torch.manual_seed(5)
    y, share = layer.train()(x)
    torch.manual_seed(5)
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / 0.7).softmax(-1)
    drawn = soft.argmax(-1)
    own = max(own, naive.gap(y, by_hand(drawn)))
    through = F.one_hot(drawn, 3).to(F64) - soft.detach() + soft
    grads = [torch.autograd.grad(z, layer.types.weight, retain_graph=True)[0] for z in (share, share_of(through, 5))]
    own = max(own, naive.gap(*grads))
    for n in range(40):
        held = [sum(stays(best[0, h], j, n, 5) for j in range(n + 1)) for h in range(2)]
        own += float(cache_size(best, 5)[0, :, n].tolist() != held)
    return own, naive.gap(y, by_hand(best))


def types_of(layer: NAtSAttention, x: Tensor) -> list[Tensor]:
    return [one.argmax(-1)[0] for one in (x @ layer.types.weight.T + layer.types.bias).chunk(2, -1)]


def share_of(y: Tensor, window: int) -> Tensor:
    n = y.shape[-2]
    segment = 1 / y[..., GLOBAL].mean(-1, keepdim=True)
    return (y[..., GLOBAL] + y[..., LOCAL] * segment / n + y[..., SLIDING] * window / n).mean()


def stays(types: Tensor, j: int, n: int, window: int) -> bool:
    """Whether token j may be read after step n."""
    kind = int(types[j])
    return kind == GLOBAL or (kind == LOCAL and GLOBAL not in types[j : n + 1].tolist()) or (kind == SLIDING and n + 1 <= j + window)
