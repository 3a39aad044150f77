"""Checks of normalization-limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax import normalization_limits as limits


@check(
    "normalization-limits",
    "logits in [-1, 1]: L max(alpha) from L = 64 to 32768, largest over smallest, all weights in softmax's bounds, as reported",
    below=1.1,
    control="Scalable-Softmax, whose F depends on L",
)
def _() -> tuple[float, float]:
    def ratio(name: str) -> float:
        found = []
        for length in (64, 512, 4096, 32768):
            s = 2 * torch.rand(length, dtype=F64) - 1
            s[0] = 1.0  # the largest possible logit, so that luck has no part in small samples
            one = limits.attention_limits(s, torch.ones(length, 1, dtype=F64), name, tops=(1,), draws=1, jacobian=False)
            low, high = 1 / (1 + (length - 1) * math.exp(2)), 1 / (1 + (length - 1) * math.exp(-2))
            if name == "softmax" and not (
                low <= one.smallest and one.largest <= high and naive.gap(torch.tensor(one.bounds), torch.tensor((low, high))) < 1e-7
            ):
                return math.inf
            found.append(length * one.largest)
        return max(found) / min(found)

    return ratio("softmax"), ratio("ssmax")


@check(
    "normalization-limits",
    "Jacobian at T = 0.5, 1, 2: norm within 1 / (2 T) and equal to (diag a - a a^T) / T",
    below=1e-10,
    control="the closed form without 1 / T",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for t in (0.5, 1.0, 2.0):
        s = 2 * torch.randn(24, dtype=F64)
        found = limits.attention_limits(s, temperature=t)
        a = (s / t).softmax(-1)
        closed = limits.softmax_jacobian(a, t)
        own = torch.autograd.functional.jacobian(lambda x, t=t: limits.normalised(x, "softmax", t), s)
        gaps.append(
            naive.gap(own, closed)
            + abs(found.jacobian - float(torch.linalg.matrix_norm(closed, 2)))
            + max(0.0, found.jacobian - found.jacobian_bound)
        )
        others.append(naive.gap(own, t * closed))
    return max(gaps), max(others)


@check(
    "normalization-limits",
    "separation d~ of the top N stays under its bound and equals loops, softmax and a user's F",
    below=1e-10,
    control="tokens without their weights",
)
def _() -> tuple[float, float]:
    own, other = 0.0, 0.0
    normalizers: tuple[str | Callable[[Tensor], Tensor], ...] = ("softmax", lambda x: 1 + x * x)
    for normalizer in normalizers:
        s, x = torch.randn(40, dtype=F64), torch.randn(40, 8, dtype=F64)
        found = limits.attention_limits(s, x, normalizer, tops=(3, 10), jacobian=False)
        a = limits.normalised(s, normalizer, 1.0)
        for n, d, bound in zip(found.tops, found.separation, found.separation_bound, strict=True):
            top = a.argsort(descending=True)[:n].tolist()
            centre = sum((a[i] * x[i] for i in top), torch.zeros(8, dtype=F64))
            loops = sum(float((centre - a[j] * x[j]).norm()) for j in range(40) if j not in top)
            bare = sum(float((x[top].sum(0) - x[j]).norm()) for j in range(40) if j not in top)
            own, other = max(own, abs(d - loops) + max(0.0, d - bound)), max(other, abs(d - bare))
    return own, other


@check(
    "normalization-limits",
    "selecting all but one token: d~ over that of selecting a tenth falls towards 0",
    below=0.1,
    control="selecting a fifth",
)
def _() -> tuple[float, float]:
    found = limits.attention_limits(torch.randn(200, dtype=F64), tops=(20, 40, 199), jacobian=False)
    return found.separation[2] / found.separation[0], found.separation[1] / found.separation[0]
