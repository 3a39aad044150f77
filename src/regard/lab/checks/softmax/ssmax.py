"""Checks of ssmax."""

from __future__ import annotations

import math

import torch

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


@check(
    "ssmax", "weight of z = [3, 0, ...] is n^{sg} / (n^{sg} + n - 1), s = 0.43, for n = 10^2..10^6", below=1e-12, control="plain softmax"
)
def _() -> tuple[float, float]:
    gaps: list[float] = []
    others: list[float] = []
    for n in (100, 10_000, 1_000_000):
        k = torch.zeros(1, 1, n, 1, dtype=F64)
        k[0, 0, 0, 0] = 3.0
        truth = n ** (0.43 * 3) / (n ** (0.43 * 3) + n - 1)
        q = torch.ones(1, 1, 1, 1, dtype=F64)
        for mechanism, into in (("ssmax", gaps), ("softmax", others)):
            into.append(abs(float(attend(q, k, (k > 0).to(F64), mechanism, scale=1.0)) - truth))
    return max(gaps), max(others)


@check(
    "ssmax",
    "causal rows use their own n: q-scaling equals the row formula, and decode equals prefill",
    below=1e-10,
    control="a global log L",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    truth = naive.attention(q, k, v, lambda s: naive.softmax(s * (0.43 * math.log(len(s)))), naive.causal)
    whole = attend(q, k, v, "ssmax", mask=Causal())
    last = attend(q[:, :, -1:], k, v, "ssmax", mask=Causal())
    fixed = attend(q * 0.43 * math.log(23), k, v, "softmax", mask=Causal())
    return max(naive.gap(whole, truth), naive.gap(last, truth[:, :, -1:])), naive.gap(fixed, truth)


@check("ssmax", "a gap g below 1/s still fades: weight at n = 10^6 with g = 1", below=0.05, control="g = 3 > 1/s")
def _() -> tuple[float, float]:
    def weight(g: float) -> float:
        k = torch.zeros(1, 1, 1_000_000, 1, dtype=F64)
        k[0, 0, 0, 0] = g
        return float(attend(torch.ones(1, 1, 1, 1, dtype=F64), k, (k > 0).to(F64), "ssmax", scale=1.0))

    return weight(1.0), weight(3.0)
