"""Checks of powerattention."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import BlockPowers, Causal, Dilated, Strided, Window
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.selected import qkv, s_attend
from regard.lab.verification import check
from regard.zoo.sparse.powerattention import blocks_read, longnet, receptive_field


@check(
    "powerattention",
    "keys the last of 513 tokens reaches after 1 .. 9 layers: difference from [11, 47, 131, 257, 383, 467, 503, 512, 513]",
    below=0,
    control="a window of the same degree",
)
def _() -> tuple[float, float]:
    known = torch.tensor([11, 47, 131, 257, 383, 467, 503, 512, 513])
    own, window = (receptive_field(mask, 513, 9).sum(-1) for mask in (Causal() & BlockPowers(1), Causal() & Window(11)))
    linear = torch.equal(window, 10 * torch.arange(1, 10) + 1)
    return float((own - known).abs().sum()), float((window - known).abs().sum()) * linear


@check(
    "powerattention",
    "odd distances the last of 513 tokens reaches in 9 layers: share",
    above=1.0,
    control="a window of 11 keys dilated by 2",
)
def _() -> tuple[float, float]:
    odd = (512 - torch.arange(513)) % 2 == 1
    return tuple(
        float(receptive_field(mask, 513, 9)[-1][odd].double().mean()) for mask in (Causal() & BlockPowers(1), Causal() & Dilated(11, 2))
    )  # type: ignore[return-value]


@check(
    "powerattention",
    "equals dense attention with the block rule spelled out, and the last row from its blocks alone",
    below=1e-12,
    control="distances 2^m + 1",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(256)

    def pairs(shift: int) -> Tensor:
        u, w = torch.arange(256)[:, None] // 16, torch.arange(256) // 16
        powers = {0, *(2**m + shift for m in range(9))}
        near = torch.tensor([[int(a - b) in powers or 0 <= int(a - b) < 2 or (int(b) < 1) for b in w.flatten()] for a in u.flatten()])
        return near & torch.ones(256, 256, dtype=torch.bool).tril()

    out = attend(q, k, v, get("powerattention", block_size=16, window_blocks=2, sink_blocks=1))
    columns = torch.cat([torch.arange(w * 16, (w + 1) * 16) for w in blocks_read(255, 16, 2, 1)])
    last = attend(q[:, :, -1:], k[:, :, columns], v[:, :, columns])
    own = max(naive.gap(out, s_attend(q, k, v, pairs(0).expand(2, -1, -1))), naive.gap(last, out[:, :, -1:]))
    return own, naive.gap(out, s_attend(q, k, v, pairs(1).expand(2, -1, -1)))


@check(
    "powerattention",
    "blocks that decoding reads equal the rule counted out, and grow with log L; reach by a loop over pairs, the baselines' too",
    below=0,
    control="a window without its last block",
)
def _() -> tuple[float, float]:
    wrong = other = 0.0
    for position in range(0, 400, 7):
        for window, sinks in ((0, 0), (4, 2)):
            u = position // 10
            truth = {u, *(u - 2**m for m in range(9)), *range(u - window + 1, u + 1), *range(sinks)}
            found = blocks_read(position, 10, window, sinks)
            wrong += found != sorted(w for w in truth if 0 <= w <= u)
            other += blocks_read(position, 10, window - 1, sinks) != found
    masks = {
        Causal() & BlockPowers(1): lambda i, j: (i - j) & (i - j - 1) == 0,
        longnet((8, 16), (2, 4)): lambda i, j: any(i // s == j // s and i % r == 0 == j % r for s, r in ((8, 2), (16, 4))),
        Causal() & Strided(5): lambda i, j: (i - j) % 5 == 0,
    }
    for mask, rule in masks.items():
        reached = {40}
        for row in receptive_field(mask, 41, 4):
            reached = {j for i in reached for j in range(i + 1) if j == i or rule(i, j)}
            wrong += set(row.nonzero().flatten().tolist()) != reached
    return wrong, other


@check(
    "powerattention",
    "LongNet's pairs as a mask, both heads: output equals softmax over pairs in one segment, every rate-th token from the head's on",
    below=1e-12,
    control="heads without an offset",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(48)

    def pairs(offset: bool) -> Tensor:
        seen = torch.zeros(2, 48, 48, dtype=torch.bool)
        for h in range(2):
            for i in range(48):
                for j in range(i + 1):
                    first = h * offset
                    seen[h, i, j] = any(i // s == j // s and i % r == j % r == first % r for s, r in ((8, 1), (16, 2), (48, 4)))
        return seen

    out = attend(q, k, v, mask=longnet((8, 16, 48), (1, 2, 4)))
    return naive.gap(out, s_attend(q, k, v, pairs(True))), naive.gap(out, s_attend(q, k, v, pairs(False)))
