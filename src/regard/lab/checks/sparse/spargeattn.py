"""Checks of spargeattn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Selection
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.policies import plan_of
from regard.lab.checks.shared.selected import qkv, s_attend
from regard.lab.planted import clustered, relative_error
from regard.lab.verification import check
from regard.zoo.sparse.spargeattn import SpargeTuner, sparge_attention


def of_mask(selection: Selection, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention under a block map, spelled out."""
    pairs = selection.keep.repeat_interleave(selection.block_q, -2).repeat_interleave(selection.block_k, -1)
    return s_attend(q, k, v, pairs[0, :, : q.shape[2], : k.shape[2]])


@check("spargeattn", "tau = 1 and no skipped product is dense attention, mechanism and tile loop", below=1e-10, control="tau = 0.5")
def _() -> tuple[float, float]:
    q, k, v = clustered(1024, 64, 64)
    truth = attend(q, k, v)
    sizes = {"block_q": 16, "block_k": 16}
    own = max(
        naive.gap(attend(q, k, v, get("spargeattn", tau=1.0, **sizes)), truth),
        naive.gap(sparge_attention(q, k, v, tau=1.0, **sizes).out, truth),
    )
    return own, naive.gap(attend(q, k, v, get("spargeattn", tau=0.5, **sizes)), truth)


@check(
    "spargeattn",
    "64 clusters of 16: relative error at theta 0.6, tau 0.98",
    below=0.05,
    control="a fifth of the error of a random map of equal density a row",
)
def _() -> tuple[float, float]:
    q, k, v = clustered(1024, 64, 64)
    truth = attend(q, k, v)
    own = plan_of("spargeattn", q, k, block_q=16, block_k=16)
    counts = own.keep.sum(-1, keepdim=True)
    rank = torch.rand(own.keep.shape).argsort(-1).argsort(-1)
    error, random = (relative_error(of_mask(Selection(keep, 16, 16), q, k, v), truth) for keep in (own.keep, rank < counts))
    return error, random / 5


@check(
    "spargeattn",
    "a key block of unlike tokens is read by every query block: share of its column",
    above=1.0,
    control="without the similarity gate",
)
def _() -> tuple[float, float]:
    q, k, _ = clustered(1024, 64, 64)
    k[:, :, 160:176] = torch.randn(1, 1, 16, 64, dtype=F64)
    column = [
        float(plan_of("spargeattn", q, k, block_q=16, block_k=16, theta=theta).keep[0, 0, :, 10].double().mean()) for theta in (0.6, -1.0)
    ]
    return column[0], column[1]


@check("spargeattn", "the map equals a loop over pooled q and centred k, ragged length and causal", below=0.0, control="keys not centred")
def _() -> tuple[float, float]:
    q, k, _ = qkv(83, 8, 1)
    q, k = 2 * q, 2 * k + 4
    q[:, :, 16:], k[:, :, 16:64] = q[:, :, 16:17] + 0.1 * q[:, :, 16:], k[:, :, 16:17]

    def loop(centred: bool) -> Tensor:
        keys = k[0, 0] - k[0, 0].mean(0) if centred else k[0, 0]
        blocks = [(range(a, min(a + 16, 83)), range(a, min(a + 16, 83))) for a in range(0, 83, 16)]
        alike = []
        for x in (q[0, 0], keys):
            sims = [sum(float(torch.cosine_similarity(x[r], x[s], 0)) for r in rows for s in rows) / len(rows) ** 2 for rows, _ in blocks]
            alike.append([sim > 0.4 and len(rows) == 16 for sim, (rows, _) in zip(sims, blocks, strict=True)])
        keep = torch.zeros(6, 6, dtype=torch.bool)
        for u in range(6):
            s = {
                w: float(q[0, 0, list(blocks[u][0])].mean(0) @ keys[list(blocks[w][0])].mean(0)) / math.sqrt(8)
                for w in range(u + 1)
                if alike[1][w]
            }
            total, kept = sum(math.exp(x) for x in s.values()), 0.0
            for place, w in enumerate(sorted(s, key=lambda w: -s[w])):
                kept += math.exp(s[w]) / total
                keep[u, w] = kept <= 0.9 or place == 0
            for w in range(u + 1):
                keep[u, w] |= not alike[1][w] or not alike[0][u]
        return keep

    own = plan_of("spargeattn", q, k, block_q=16, block_k=16, theta=0.4, tau=0.9, causal=True).keep[0, 0]
    return float((own != loop(True)).sum()), float((own != loop(False)).sum())


@check(
    "spargeattn",
    "the tuner keeps the error under its bound (0.08 + 0.02) with a quarter of the tiles left out",
    below=0.1,
    control="random blocks of that density",
)
def _() -> tuple[float, float]:
    q, k, v = clustered(256, 32, 16)
    tuner = SpargeTuner(block_q=16, block_k=16, grid=0.25).fit(q, k, v)
    found = sparge_attention(q, k, v, theta=tuner.theta, tau=tuner.tau, pv_lambda=max(tuner.pv_lambda), block_q=16, block_k=16)
    truth = attend(q, k, v)

    def error(out: Tensor) -> float:
        return float((out - truth).abs().sum() / truth.abs().sum())

    random = torch.rand(found.keep.shape).argsort(-1).argsort(-1) < found.keep.sum(-1, keepdim=True)
    return error(found.out) if found.qk_sparsity >= 0.25 else math.inf, error(of_mask(Selection(random, 16, 16), q, k, v))


@check("spargeattn", "int8 scores from centred keys: relative error", below=0.02, control="keys quantised with their mean")
def _() -> tuple[float, float]:
    q, k, v = qkv(256, 32, 2)
    k = k + 40 * torch.randn(32, dtype=F64)
    truth = attend(q, k, v)
    from regard.zoo.sparse.spargeattn import quantised

    own = sparge_attention(q, k, v, tau=1.0, quant="int8").out
    return relative_error(own, truth), relative_error(attend(quantised(q, 128), quantised(k, 64), v), truth)
