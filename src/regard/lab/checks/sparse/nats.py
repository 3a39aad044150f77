"""Checks of nats."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Window
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
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
