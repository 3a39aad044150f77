"""LLN attention: its fit for another head_dim, and whose spread is counted where queries are not the keys' tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import regard
from regard import RegardError
from regard.zoo.linear.lln_attention import A, B, fit, temperature

F64 = torch.float64


def test_the_fit_is_the_line_through_measured_log_variances() -> None:
    """Of one feature map for queries and keys, both of unit variance: t^2 from 1 to 6 in steps of a half, ln of weights over 8 draws."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(8, 24, 16, generator=generator, dtype=F64).numpy() for _ in range(2))
    squares, spread = np.arange(1, 6.25, 0.5), []
    for square in squares:
        t = math.sqrt(square)
        logs = np.log(np.einsum("bid,bjd->bij", np.exp(t * q), np.exp(t * k)))
        spread.append(logs.var(-1, ddof=1).mean())
    slope, offset = np.polyfit(2 * squares, spread, 1)
    assert fit(16, 24, 3) == pytest.approx((slope, offset), rel=1e-6)
    assert fit(16, 24) != fit(16, 24, 1) and len(squares) == 11
    # What the temperature solves: 2 a t^2 + b is the log-variance s_q^2 s_k^2 that softmax has.
    s_q, s_k = torch.tensor(1.2, dtype=F64), torch.tensor(0.9, dtype=F64)
    assert float(2 * A * temperature(s_q, s_k, A, B) ** 2 + B) == pytest.approx((1.2 * 0.9) ** 2)


@pytest.mark.parametrize("length", [4, 9])
def test_padding_of_keys_leaves_other_queries_counted(length: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 2, length, 6, dtype=F64)
    k, v = (torch.randn(2, 2, 9, 6, dtype=F64) for _ in range(2))
    keep = torch.arange(9) < torch.tensor([[9], [6]])
    real = keep[:, None, :, None]
    out = regard.attend(q, k, v, "lln-attention", mask=regard.Padding(), keep=keep)
    sigma_k = k.movedim(1, 2)[keep].std()
    sigma_q = (q.movedim(1, 2)[keep] if length == 9 else q).std()
    t = ((sigma_q * sigma_k) ** 2 - B).sqrt() / math.sqrt(2 * A)
    w = torch.exp(q * t / sigma_q) @ (torch.exp(k * t / sigma_k) * real).mT
    truth = w @ v / w.sum(-1, keepdim=True)
    seen = keep[:, None, :, None] if length == 9 else torch.ones(2, 1, length, 1, dtype=torch.bool)
    torch.testing.assert_close(out * seen, truth * seen, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{"statistics": "all"}, {"shift": "largest"}, {"shift": "given"}, {"diagonal": "blend"}], ids=str)
def test_what_there_is_not(options: dict[str, str]) -> None:
    with pytest.raises(RegardError, match=next(iter(options))):
        regard.get("lln-attention", **options)
    assert regard.get("lln-attention", statistics="given", shift="given") != regard.get("lln-attention", statistics="given")
