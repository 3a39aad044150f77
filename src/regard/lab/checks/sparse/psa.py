"""Checks of psa."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
from regard.lab.planted import autoregressive, relative_error
from regard.lab.verification import check
from regard.zoo.sparse.psa import MASSES, RANKS, levels_of


@check("psa", "a map of level 1 everywhere is dense attention, and causal too", below=1e-12, control="level 2")
def _() -> tuple[float, float]:
    q, k, v = qkv(128)
    own, other = (
        naive.gap(attend(q, k, v, get("psa", block_size=16), levels=torch.full((1, 2, 8, 8), level)), attend(q, k, v)) for level in (1, 2)
    )
    causal = attend(q, k, v, get("psa", block_size=16, causal=True), levels=torch.ones(1, 2, 8, 8, dtype=torch.long).tril())
    return max(own, naive.gap(causal, attend(q, k, v, mask=Causal()))), other


@check("psa", "keys and values constant in groups of 8: random levels give the dense output", below=1e-12, control="without log p")
def _() -> tuple[float, float]:
    q, k, v = qkv(128)
    k, v = (x[:, :, ::8].repeat_interleave(8, 2) for x in (2 * k, v))
    levels = torch.tensor([1, 2, 4, 8])[torch.randint(4, (1, 2, 8, 8))]
    truth = attend(q, k, v)

    def without() -> Tensor:
        rows = []
        for u in range(8):
            keys = torch.cat([k[0, 0, w * 16 : w * 16 + 16 : int(levels[0, 0, u, w])] for w in range(8)])
            values = torch.cat([v[0, 0, w * 16 : w * 16 + 16 : int(levels[0, 0, u, w])] for w in range(8)])
            rows.append((q[0, 0, u * 16 : u * 16 + 16] @ keys.T / math.sqrt(8)).softmax(-1) @ values)
        return torch.cat(rows)

    return naive.gap(attend(q, k, v, get("psa", block_size=16), levels=levels), truth), naive.gap(without(), truth[0, 0])


@check(
    "psa",
    "random levels with 0 equal an explicit concatenation of pooled tokens, with gradients",
    below=1e-10,
    control="skipped blocks read at level 8",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(96))
    levels = torch.tensor([0, 1, 2, 4, 8])[torch.randint(5, (1, 2, 6, 6))]
    levels[..., 0] = 1

    def written(levels: Tensor) -> Tensor:
        heads = []
        for h in range(2):
            rows = []
            for u in range(6):
                ks, vs, extra = [], [], []
                for w in range(6):
                    p = int(levels[0, h, u, w])
                    if p:
                        block = slice(w * 16, w * 16 + 16)
                        ks.append(k[0, h, block].reshape(-1, p, 8).mean(1))
                        vs.append(v[0, h, block].reshape(-1, p, 8).mean(1))
                        extra += [math.log(p)] * (16 // p)
                s = q[0, h, u * 16 : u * 16 + 16] @ torch.cat(ks).T / math.sqrt(8) + torch.tensor(extra, dtype=F64)
                rows.append(s.softmax(-1) @ torch.cat(vs))
            heads.append(torch.cat(rows))
        return torch.stack(heads)[None]

    out = attend(q, k, v, get("psa", block_size=16), levels=levels)
    truth, seed = written(levels), torch.randn(1, 2, 96, 8, dtype=F64)
    pairs = zip(
        (out, *torch.autograd.grad((out * seed).sum(), (q, k, v))),
        (truth, *torch.autograd.grad((truth * seed).sum(), (q, k, v))),
        strict=True,
    )
    return max(naive.gap(a, b) for a, b in pairs), naive.gap(out, written(torch.where(levels == 0, 8, levels)))


@check(
    "psa",
    "slowly drifting tokens at the cost of 5 of 16 blocks: twice the relative error, the largest of 5 draws",
    below=0.1,
    control="the error of the best 5 blocks alone, the smallest of 5",
)
def _() -> tuple[float, float]:
    own, binary = [], []
    ranges = ((1, 2 / 16), (2, 4 / 16), (4, 8 / 16), (8, 1.0))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (autoregressive(512, 16, 0.97, generator)[None, None] for _ in range(3))
        truth = attend(q, k, v)
        own.append(relative_error(attend(q, k, v, get("psa", block_size=32, sample=8, ranges=ranges)), truth))
        binary.append(relative_error(attend(q, k, v, get("psa", block_size=32, sample=8, ranges=((1, 5 / 16),))), truth))
    return 2 * max(own), min(binary)


@check(
    "psa",
    "both modes give every pair one level, by rank shares and by cumulative mass of a loop: pairs that differ",
    below=0,
    control="the other mode",
)
def _() -> tuple[float, float]:
    scores = torch.rand(1, 1, 20, 20, dtype=F64)

    def loop(mode: str) -> Tensor:
        level = torch.zeros(20, 20, dtype=torch.long)
        for u in range(20):
            order, total = sorted(range(20), key=lambda w: -float(scores[0, 0, u, w])), 0.0
            for rank, w in enumerate(order):
                share = rank / 20 if mode == "topk" else total / float(scores[0, 0, u].sum())
                level[u, w] = 1 if rank == 0 else next((value for value, end in (RANKS if mode == "topk" else MASSES) if share < end), 0)
                total += float(scores[0, 0, u, w])
        return level

    found = {mode: levels_of(scores, mode, RANKS if mode == "topk" else MASSES)[0, 0] for mode in ("topk", "threshold")}
    own = sum(float((found[mode] != loop(mode)).sum()) for mode in found)
    return own, float((found["topk"] != loop("threshold")).sum())
