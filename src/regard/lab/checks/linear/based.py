"""Checks of based."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Recurrent
from regard.algebra.feature_map import taylor, taylor_packed
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.feature_maps import naive_kernel
from regard.lab.checks.shared.recurrent import forms, qkv
from regard.lab.verification import check


@check("based", "phi(q).phi(k) = 1 + s + s^2/2, packed and full", below=1e-12, control="without the quadratic term")
def _() -> tuple[float, float]:
    q, k, _ = qkv(30, 16)
    s = q @ k.transpose(-1, -2) / 4
    truth = 1 + s + s * s / 2
    own = max(naive.gap(phi(q) @ phi(k).transpose(-1, -2), truth) for phi in (taylor, taylor_packed))
    return own, naive.gap(1 + s, truth)


@check("based", "recurrent == chunked == parallel, and equals a token loop", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv(37)
    truth = naive_kernel(taylor(q), taylor(k), v)
    own = 0.0
    for packed in (False, True):
        mechanism = get("based", packed=packed)
        assert isinstance(mechanism, Recurrent)
        own = max([own, *[naive.gap(out, truth) for out in forms(mechanism, q, k, v)]])
    return own, naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


def recall(feature: Callable[[Tensor], Tensor], d: int, pairs: int, seeds: int = 10) -> float:
    """Training-free associative recall: share of queried keys whose nearest value is the one stored."""
    right = 0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        keys = F.normalize(torch.randn(pairs, d, generator=generator, dtype=F64), dim=-1) * 1.5 * math.sqrt(d)
        values = F.normalize(torch.randn(pairs, 32, generator=generator, dtype=F64), dim=-1)
        a = feature(keys) @ feature(keys).T
        read = (a @ values) / a.sum(-1, keepdim=True).clamp_min(1e-12)
        right += int(((read @ values.T).argmax(-1) == torch.arange(pairs)).sum())
    return right / (seeds * pairs)


@check("based", "training-free recall of 64 pairs, d' = 16", above=0.95, control="ReLU linear attention")
def _() -> tuple[float, float]:
    return recall(taylor, 16, 64), recall(torch.relu, 16, 64)


@check("based", "the state-size dial: recall of 256 pairs at d' = 32", above=0.9, control="d' = 16")
def _() -> tuple[float, float]:
    dial = [recall(taylor, d, 256, 4) for d in (8, 16, 24, 32)]
    return dial[3] if dial == sorted(dial) else 0.0, dial[1]
