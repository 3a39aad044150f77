"""Checks of hip."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.policies import plan_of
from regard.lab.checks.shared.selected import qkv, s_attend
from regard.lab.planted import autoregressive
from regard.lab.verification import check
from regard.zoo.sparse.hip import tree


@check("hip", "a prompt of at most mask_k tokens is dense causal attention", below=1e-12, control="mask_k = L / 4")
def _() -> tuple[float, float]:
    q, k, v = qkv(128, 16)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("hip", mask_k=size, sinks=1, window=1)) for size in (128, 32)]
    return naive.gap(outs[0], truth), naive.gap(outs[1], truth)


@check("hip", "keys read by one descent, T = 2048, mask_k = 256, against 2 mask_k log2(T / mask_k)", below=0, control="all keys scored")
def _() -> tuple[float, float]:
    q, k, _ = qkv(2048, 32, 1)
    reads = tree(q[:, :, -32:], k, 2016, 256, 32, 2, 0, 0, 2, "first")[1][0]
    return float(abs(reads - 1536)), float(abs(2048 - 1536))


def captured(q: Tensor, k: Tensor) -> tuple[float, float]:
    """Mass in HiP's 256 keys, and in 256 random ones, over that of each query's best 256."""
    own, random = [], []
    for i in range(8):
        p = (k[0, 0] @ q[0, 0, i] / math.sqrt(32)).softmax(0)
        keep = tree(q[:, :, i : i + 1], k, 2047, 256, 1, 2, 0, 0, 1, "first")[0].keep[0, 0, 0]
        best = float(p.topk(256).values.sum())
        own.append(float(p.unflatten(0, (-1, 2)).sum(-1)[keep].sum()) / best)
        random.append(float(p[torch.randperm(2048)[:256]].sum()) / best)
    return sum(own) / 8, sum(random) / 8


@check("hip", "slowly drifting keys: mass captured over the exact top 256's", above=0.95, control="256 random keys")
def _() -> tuple[float, float]:
    k = autoregressive(2048, 32, 0.98)[None, None]
    return captured(2 * torch.randn(1, 1, 8, 32, dtype=F64), k)


@check(
    "hip",
    "keys without locality: the tree misses much of the mass (so it has not scored everything)",
    below=0.9,
    control="slowly drifting keys",
)
def _() -> tuple[float, float]:
    q = 2 * torch.randn(1, 1, 8, 32, dtype=F64)
    return captured(q, torch.randn(1, 1, 2048, 32, dtype=F64))[0], captured(q, autoregressive(2048, 32, 0.98)[None, None])[0]


@check(
    "hip",
    "equals dense attention under the blocks of the tree, sinks and window in the same softmax, and a query alone",
    below=1e-10,
    control="without the sinks",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(200, 16)
    sizes = {"mask_k": 32, "block_q": 8, "block_k": 2, "sinks": 4, "window": 12}
    out = attend(q, k, v, get("hip", **sizes))
    keep = plan_of("hip", q, k, **sizes)
    pairs = keep.keep.repeat_interleave(8, -2).repeat_interleave(2, -1)[0, :, :200, :200] & torch.ones(200, 200, dtype=torch.bool).tril()
    truth = s_attend(q, k, v, pairs)
    without = pairs.clone()
    without[:, 64:, :4] = False
    alone = attend(q[:, :, -1:], k, v, get("hip", **{**sizes, "block_q": 1}))
    one = tree(q[:, :, -1:], k, 199, 32, 1, 2, 4, 12, 2, "first")[0].keep.repeat_interleave(2, -1)[0, :, :, :200]
    return max(naive.gap(out, truth), naive.gap(alone, s_attend(q[:, :, -1:], k, v, one))), naive.gap(out, s_attend(q, k, v, without))
