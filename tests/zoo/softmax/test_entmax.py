"""alpha-entmax from the definition, by bisection in float64: alpha near 1 and above 2, both precisions, rows of -inf."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.zoo.softmax.entmax import entmax_weights
from regard.zoo.softmax.softpick import softpick_weights
from regard.zoo.softmax.sparsemax import sparsemax_weights


def definition(z: list[float], alpha: float) -> list[float]:
    """((alpha - 1) z - tau)_+^(1 / (alpha - 1)) with tau by bisection on z - max, one number at a time; softmax at 1."""
    top = max(z)
    if math.isinf(top):
        return [0.0 for _ in z]
    x = [a - top for a in z]
    if alpha == 1:
        total = sum(math.exp(a) for a in x)
        return [math.exp(a) / total for a in x]
    d = alpha - 1

    def weight(a: float, c: float) -> float:
        t = d * (a - c)
        return math.exp(math.log1p(t) / d) if t > -1 else 0.0

    low, high = 0.0, min(1 / d, math.log(len(x)) + 1)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weight(a, middle) for a in x) >= 1 else (low, middle)
    return [weight(a, low) for a in x]


ALPHAS = [1 + 1e-6, 1.0001, 1.01, 1.0999, 1.1001, 1.3, 1.5, 2.0, 2.3, 3.0, 5.0]


def rows(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    z = torch.randn(6, 40, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [3.0], [1.0], [1.0], [20.0]])
    z[3, 10:] = -float("inf")
    z[4] = 0.3
    return z.to(dtype)


def allowed(dtype: torch.dtype, alpha: float, smooth: float) -> float:
    """What rounding of scores may change: near its threshold a weight is (alpha - 1) s - tau to the power 1 / (alpha - 1)."""
    step = torch.finfo(dtype).eps * (1 + float(rows(torch.float64)[:3].abs().max()) * 20)
    return max(smooth, step ** (1 / (alpha - 1)) if alpha > 2 else 0.0)


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_map(alpha: float, dtype: torch.dtype) -> None:
    z = rows(dtype)
    want = torch.tensor([definition(row, alpha) for row in z.double().tolist()], dtype=torch.float64)
    tolerance = allowed(dtype, alpha, 1e-9 if dtype == torch.float64 else 2e-5)
    got = entmax_weights(z, torch.tensor(alpha, dtype=dtype))
    assert float((got.double() - want).abs().max()) < tolerance
    assert float((got.sum(-1) - 1).abs().max()) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("executor", ["reference", "tiled", "native"])
def test_attention(alpha: float, executor: str) -> None:
    """Rows as scores: q = z, k = v = 1. Learned and fixed alpha, float32 (float64 where it runs)."""
    for dtype in (torch.float32,) if executor == "native" else (torch.float32, torch.float64):
        z = rows(dtype)
        want = torch.tensor([definition(row, alpha) for row in z.double().tolist()], dtype=torch.float64)
        seen, eye = z.isfinite(), torch.eye(40, dtype=dtype)[None, None]
        q = torch.where(seen, z, 0.0)[None, None]
        tolerance = allowed(dtype, alpha, 1e-9 if dtype == torch.float64 else 5e-5)
        for mechanism, given in (
            (regard.get("entmax", alpha=alpha), {}),
            (regard.get("entmax"), {"alpha": torch.tensor([alpha], dtype=dtype)}),
        ):
            out = regard.attend(q, eye, eye, mechanism, mask=seen, scale=1.0, executor=executor, **given)
            assert float((out[0, 0].double() - want).abs().max()) < tolerance, (dtype, given)


@pytest.mark.parametrize("alpha", [1.0001, 1.05, 1.37, 1.5, 1.9, 2.0])
def test_gradients(alpha: float) -> None:
    z = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entmax_weights, (z, a))
    assert torch.autograd.gradgradcheck(lambda z: entmax_weights(z, a.detach()), (z,))


def test_entries_and_rows_of_minus_infinity() -> None:
    z = torch.randn(3, 6, dtype=torch.float64)
    z[1, 2:], z[2] = -float("inf"), -float("inf")
    for function in (entmax_weights, sparsemax_weights, softpick_weights, lambda z: entmax_weights(z, torch.tensor(1.2))):
        leaf = z.clone().requires_grad_()
        p = function(leaf)
        (grad,) = torch.autograd.grad((p * torch.arange(6.0)).sum(), leaf)
        assert bool(p.isfinite().all()) and bool(grad.isfinite().all())
        assert float(p[2].abs().max()) == 0 and float(p[1, 2:].abs().max()) == 0
        torch.testing.assert_close(p[1, :2], function(z[1:2, :2])[0])
    a = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(entmax_weights(z, a).square().sum(), a)
    assert bool(grad.isfinite())


@pytest.mark.parametrize("executor", ["reference", "tiled"])
@pytest.mark.parametrize("name", ["sparsemax", "entmax"])
def test_scores_of_minus_infinity_in_attention(name: str, executor: str) -> None:
    """A position that hides keys, all of them in one row."""
    from dataclasses import replace

    hidden = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    hidden[..., 1, 2:], hidden[..., 3, :] = -float("inf"), -float("inf")
    mechanism = replace(regard.get(name), position=regard.algebra.Modified(lambda s, hide: s + hide, (regard.Input("hide", "bhqk"),)))
    q, k, v = (torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = regard.attend(q, k, v, mechanism, hide=hidden, executor=executor)
    want = regard.attend(q, k, v, name, mask=hidden == 0, executor="reference")
    torch.testing.assert_close(out, want)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_alpha_below_one_is_refused() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(regard.RegardError, match="at least 1"):
        regard.attend(q, q, q, "entmax", alpha=torch.tensor([0.9]))
    with pytest.raises(regard.RegardError, match="at least 1"):
        entmax_weights(q, 0.9)


@pytest.mark.parametrize("executor", [None, "tiled", "reference"])
def test_left_at_its_default_alpha_runs_as_a_number(executor):
    q, k, v = (torch.randn(2, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    given = regard.attend(q, k, v, "entmax", alpha=torch.full((2,), 1.5, dtype=torch.float64), executor=executor)
    assert (regard.attend(q, k, v, "entmax", executor=executor) - given).abs().max() < 1e-6
    assert not regard.plan(q, k, v, "entmax").mechanism.declared and regard.get("entmax").declared
