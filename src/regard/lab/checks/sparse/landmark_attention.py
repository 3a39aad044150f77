"""Checks of landmark-attention."""

from __future__ import annotations

import math

import torch
from torch.autograd import gradcheck

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.long_context import grouped_loop
from regard.lab.verification import check
from regard.zoo.sparse.landmark_attention import LandmarkAttention, LandmarkCache, grouped_softmax, with_landmarks


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
