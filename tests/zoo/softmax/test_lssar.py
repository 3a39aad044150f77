"""Length-scaled softplus attention row by row: its first stage alone, other powers and eps, and re-weighting of any weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.zoo.softmax.lssar import reweight


def sharpened(a: list[float], p: float, eps: float) -> list[float]:
    n = len(a)
    r = [max(n * x - (1.0 if n > 3 else 0.0), 0.0) ** p for x in a]
    return [x / (sum(r) + eps) for x in r]


def row(q: Tensor, keys: Tensor, p: float | None, eps: float) -> list[float]:
    d, n = len(q), len(keys)
    cosines = [float(q @ k / (q.norm() * k.norm())) for k in keys]
    s = [math.log1p(math.exp(math.log(d) * math.log(n) * c)) for c in cosines]
    a = [x / (sum(s) + eps) for x in s]
    return a if p is None else sharpened(a, p, eps)


@pytest.mark.parametrize(
    ("options", "p", "eps"),
    [
        ({}, 15.0, 1e-8),
        ({"p": 3}, 3.0, 1e-8),
        ({"p": 2.5}, 2.5, 1e-8),
        ({"p": 4.0, "eps": 0.3}, 4.0, 0.3),
        ({"p": 0.5}, 0.5, 1e-8),
        ({"reweight": False}, None, 1e-8),
        ({"reweight": False, "eps": 0.5}, None, 0.5),
    ],
)
@pytest.mark.parametrize("executor", ["reference", None])
def test_attention(options: dict[str, object], p: float | None, eps: float, executor: str | None) -> None:
    q, k, v = (torch.randn(1, 2, 12, 6, dtype=torch.float64) for _ in range(3))
    want = torch.zeros_like(v)
    for h in range(2):
        for i in range(12):
            w = row(q[0, h, i], k[0, h, : i + 1], p, eps)
            want[0, h, i] = torch.tensor(w, dtype=torch.float64) @ v[0, h, : i + 1]
    found = regard.attend(q, k, v, regard.get("lssar", **options), mask=regard.Causal(), executor=executor)
    torch.testing.assert_close(found, want, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"reweight": False}])
def test_padding(options: dict[str, object]) -> None:
    """n counts the keys that are kept."""
    q, k, v = (torch.randn(1, 1, 9, 6, dtype=torch.float64) for _ in range(3))
    keep = torch.tensor([[True, True, False, True, False, True, True, True, False]])
    mechanism = regard.get("lssar", **options)
    found = regard.attend(q, k, v, mechanism, mask=regard.Padding(), keep=keep)
    at = keep[0].nonzero()[:, 0]
    want = [
        torch.tensor(row(q[0, 0, i], k[0, 0, at], None if options else 15.0, 1e-8), dtype=torch.float64) @ v[0, 0, at] for i in range(9)
    ]
    torch.testing.assert_close(found[0, 0], torch.stack(want), atol=1e-11, rtol=1e-9)


def test_reweighting_of_any_weights() -> None:
    w = torch.randn(2, 5, 8, dtype=torch.float64).softmax(-1)
    want = [[sharpened(a, 15.0, 1e-8) for a in rows] for rows in w.tolist()]
    torch.testing.assert_close(reweight(w), torch.tensor(want, dtype=torch.float64))
    want = [[sharpened(a, 3.0, 0.2) for a in rows] for rows in w.tolist()]
    torch.testing.assert_close(reweight(w, 3, 0.2), torch.tensor(want, dtype=torch.float64))
    seen = torch.ones(5, 8, dtype=torch.bool).tril(1)
    masked = torch.randn(5, 8, dtype=torch.float64).masked_fill(~seen, -math.inf).softmax(-1)
    found = reweight(masked, p=3.0, seen=seen)
    for i in range(5):
        torch.testing.assert_close(found[i, : i + 2], torch.tensor(sharpened(masked[i, : i + 2].tolist(), 3.0, 1e-8), dtype=torch.float64))
        assert float(found[i, i + 2 :].abs().sum()) == 0


def test_steep_powers_stay_finite_in_float32() -> None:
    q, k, v = (torch.randn(1, 1, 4000, 16) for _ in range(3))
    leaf = (q * 3).requires_grad_()
    out = regard.attend(leaf, k, v, regard.get("lssar", p=40.0))
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert bool(out.isfinite().all()) and bool(grad.isfinite().all())


def test_a_power_of_zero_is_refused() -> None:
    with pytest.raises(regard.RegardError, match="positive power"):
        regard.get("lssar", p=0)
