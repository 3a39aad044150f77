"""Checks of cog-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, RowLocal, Weighted
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv, weights_of
from regard.lab.verification import check
from regard.zoo.softmax.cog_attention import strength


@check("cog-attention", "tiles == sign(s) e^|s| / sum e^|s|, causal", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv(53, std=1.5)
    truth = naive.attention(q, k, v, lambda s: torch.sign(s) * naive.softmax(s.abs()), naive.causal)
    return naive.gap(attend(q, k, v, "cog-attention", mask=Causal()), truth), naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


@check("cog-attention", "f(-q, k, v) == -f(q, k, v)", below=1e-12, control="softmax")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    return (
        naive.gap(attend(-q, k, v, "cog-attention"), -attend(q, k, v, "cog-attention")),
        naive.gap(attend(-q, k, v, "softmax"), -attend(q, k, v, "softmax")),
    )


@check("cog-attention", "sum_j |p_ij| = 1, while signed sums leave [0.99, 1]", below=1e-12, control="the signed sum")
def _() -> tuple[float, float]:
    p = weights_of(torch.randn(30, 40, dtype=F64), "cog-attention")
    one = torch.ones(30, dtype=F64)
    return naive.gap(p.abs().sum(-1), one), naive.gap(p.sum(-1), one)


@check("cog-attention", "one head deletes: q = 6 sqrt(d) (k_1 - k_2) reads (v_1 - v_2) / 2 within 2%", below=0.02, control="softmax")
def _() -> tuple[float, float]:
    k = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0][None, None]
    v = torch.randn(1, 1, 8, 8, dtype=F64)
    q = 6 * math.sqrt(8) * (k[:, :, :1] - k[:, :, 1:2])
    truth = (v[:, :, :1] - v[:, :, 1:2]) / 2
    size = float(truth.abs().max())
    return naive.gap(attend(q, k, v, "cog-attention"), truth) / size, naive.gap(attend(q, k, v, "softmax"), truth) / size


def nowhere_zero(s: Tensor, c: Tensor) -> Tensor:
    return torch.where(s >= 0, 1.0, -1.0) * torch.exp(torch.abs(s) - c)


@check(
    "cog-attention",
    "a score of exactly 0 weighs 0 and counts in the sum; a row of zeros weighs nothing",
    below=1e-12,
    control="sign(0) = 1",
)
def _() -> tuple[float, float]:
    rows = [[0.0, 1.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, -1.0, 0.5]]
    truth = [[(x > 0) - (x < 0) and math.copysign(math.exp(abs(x)), x) / sum(math.exp(abs(y)) for y in row) for x in row] for row in rows]
    s, wanted = torch.tensor(rows, dtype=F64), torch.tensor(truth, dtype=F64)
    other = Weighted(normalizer=RowLocal(nowhere_zero, strength, shift="maxabs"))
    return naive.gap(weights_of(s, "cog-attention"), wanted), naive.gap(weights_of(s, other), wanted)
