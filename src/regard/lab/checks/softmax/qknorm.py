"""Checks of qknorm."""

from __future__ import annotations

import math

import torch

from regard.algebra import Causal, Rope
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.softmax.qknorm import g0_from_lengths


@check("qknorm", "output does not change when any q_i is scaled by 1e3 or any k_j by 1e-3", below=1e-9, control="scaled dot product")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    a, c = torch.ones(1, 1, 37, 1, dtype=F64), torch.ones(1, 1, 37, 1, dtype=F64)
    a[:, :, 5], c[:, :, 9] = 1e3, 1e-3
    g = torch.full((2,), 7.0, dtype=F64)
    own = naive.gap(
        attend(q * a, k * c, v, get("qknorm", eps=1e-12), temperature=g), attend(q, k, v, get("qknorm", eps=1e-12), temperature=g)
    )
    return own, naive.gap(attend(q * a, k * c, v, "softmax"), attend(q, k, v, "softmax"))


@check("qknorm", "equals softmax(g cos(q, k)), causal, with rotary positions after it", below=1e-10, control="scaled dot product")
def _() -> tuple[float, float]:
    q, k, v = qkv(29)
    truth = naive.attention(q, k, v, naive.softmax, naive.causal, score=lambda a, c: 7 * (a @ c) / (a.norm() * c.norm()))
    own = attend(q, k, v, "qknorm", mask=Causal(), temperature=torch.full((2,), 7.0, dtype=F64))
    at = torch.arange(29)
    turned = naive.gap(Rope().rotate(q, at).norm(dim=-1), q.norm(dim=-1))
    return max(naive.gap(own, truth), turned), naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


@check(
    "qknorm", "g0 is log2(L^2 - L), L the 97.5th percentile of lengths: 100 alone, and 1..401", below=1e-9, control="the longest of them"
)
def _() -> tuple[float, float]:
    truth = math.log2(391 * 391 - 391)  # of 1..401, 390 lie below 391 and 10 above
    constant = abs(g0_from_lengths([100] * 50) - math.log2(9900))
    return max(constant, abs(g0_from_lengths(range(1, 402)) - truth)), abs(g0_from_lengths([401]) - truth)


@check("qknorm", "without an initial value the scale is log2(L^2 - L) of the call's L keys", below=1e-10, control="a fixed scale")
def _() -> tuple[float, float]:
    q, k, v = qkv(29)
    truth = naive.attention(q, k, v, naive.softmax, score=lambda a, c: math.log2(29 * 28) * (a @ c) / (a.norm() * c.norm()))
    return naive.gap(attend(q, k, v, "qknorm"), truth), naive.gap(attend(q, k, v, get("qknorm", init=7.0)), truth)
