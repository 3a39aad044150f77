"""Prompts and heads that do not fit."""

import math

import pytest
import torch

import regard
from regard.zoo.analysis import icl_linear_regression
from regard.zoo.analysis.icl_linear_regression import (
    RegressionHeads,
    approximate_risk,
    best_mu,
    descent,
    head_pattern,
    planted_heads,
    regression_prompts,
    ridge,
    train_regression,
)


def test_prompts_and_heads_of_bad_sizes_are_refused():
    for call, message in (
        (lambda: regression_prompts(2, rho=1.0), "rho"),
        (lambda: RegressionHeads(normalizer="relu"), "normalizer"),
        (lambda: planted_heads(torch.ones(2), torch.ones(3), 4), "omega"),
        (lambda: head_pattern(RegressionHeads(4, 2, tasks=2)), "2 tasks"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()


def test_prompts_are_correlated_as_asked_for():
    x = regression_prompts(20_000, 1, 3, rho=0.5, generator=torch.Generator().manual_seed(0))[2]
    torch.testing.assert_close(x.T @ x / len(x), 0.5 ** (torch.arange(3)[:, None] - torch.arange(3)).abs().float(), rtol=0.05, atol=0.05)


def test_prompts_are_of_one_task_and_its_noise():
    for sigma in (0.0, 0.7):
        x, y, query, answer = regression_prompts(
            300, 12, 3, sigma=sigma, tasks=2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        assert x.shape == (300, 12, 3) and y.shape == (300, 12, 2) and query.shape == (300, 3) and answer.shape == (300, 2)
        beta = torch.linalg.lstsq(x, y).solution
        left = float((y - x @ beta).square().sum() / (300 * 2 * (12 - 3)))
        assert left == pytest.approx(sigma**2, abs=0.03) and 0.25 < float(beta.var()) - sigma**2 / 8 < 0.45  # 1 / d
        assert float((answer - torch.einsum("bd,bdt->bt", query, beta)).square().mean()) == pytest.approx(sigma**2 * (1 + 3 / 8), abs=0.15)
    assert regression_prompts(2)[0].shape == (2, 40, 5)


def test_descent_ridge_and_risk_by_hand():
    x, y, query, _ = regression_prompts(2, 6, 3, tasks=2, dtype=torch.float64)
    for b in range(2):
        mean, t = x[b].mean(0), 0.7 / 6
        for debiased in (True, False):
            truth = t * sum(y[b, n] * ((x[b, n] - (mean if debiased else 0)) @ query[b]) for n in range(6))
            assert torch.allclose(descent(x, y, query, 0.7, debiased)[b], truth)
        assert torch.allclose(descent(x, y, query, 0.7)[b], descent(x, y, query, 0.7, True)[b])
        beta = torch.linalg.solve(x[b].T @ x[b] + 0.3 * torch.eye(3), x[b].T @ y[b])
        assert torch.allclose(ridge(x, y, query, 0.3)[b], query[b] @ beta)
    omega, mu = torch.tensor([0.2, -0.3], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64)
    risk = 1 + 0.04
    for i in range(2):
        risk -= 2 * mu[i] * omega[i]
        for j in range(2):
            risk += mu[i] * mu[j] * (omega[i] * omega[j] + 1.04 / 9 * math.exp(4 * omega[i] * omega[j]))
    assert float(approximate_risk(omega, mu, 9, 4, 0.2)) == pytest.approx(float(risk))
    best = best_mu(omega, 9, 4, 0.2).requires_grad_()
    (slope,) = torch.autograd.grad(approximate_risk(omega, best, 9, 4, 0.2), best)
    assert float(slope.abs().max()) < 1e-12


def test_heads_begin_by_their_spread_and_read_by_hand():
    torch.manual_seed(0)
    for options, spread in (({}, 21**-0.5), ({"std": 0.3}, 0.3)):
        heads = RegressionHeads(20, 8, **options)
        assert all(abs(float(p.std()) / spread - 1) < 0.1 for p in heads.parameters())
    for normalizer in ("softmax", "linear"):
        model = RegressionHeads(3, 2, 2, normalizer).double()
        x, y, query, _ = regression_prompts(2, 6, 3, tasks=2, dtype=torch.float64)
        total = torch.zeros(2, 2, dtype=torch.float64)
        for h in range(2):
            z, asked = torch.cat((x, y), 2), torch.cat((query, torch.zeros(2, 2)), 1)
            s = torch.einsum("bld,bd->bl", z @ model.k[h].T, asked @ model.q[h].T) / 5**0.5
            w = s.softmax(1) if normalizer == "softmax" else s / 6
            total += torch.einsum("bl,bld->bd", w, z) @ model.v[h].T @ model.out[h].T
        assert torch.allclose(model(x, y, query), total)


def test_patterns_by_hand():
    model = planted_heads(torch.tensor([2.0, -4.0]), torch.tensor([1.0, -0.5]), 3)
    with torch.no_grad():
        model.k[0, 0, 1] = 0.3  # qk[0][0, 1] = 2 * 0.3
        model.q[1, 2, 2] *= 1.5  # qk[1][2, 2] = -6
        model.v[0, 3, 1] = 0.2  # ov[0][1] = 0.2
    found = head_pattern(model)
    omega = [2.0, -14 / 3]
    size = (2 + 14 / 3) / 2
    assert found.omega.tolist() == pytest.approx(omega) and found.mu.tolist() == [1.0, -0.5]
    assert found.off == pytest.approx(0.6 / size) and found.spread == pytest.approx((6 - 14 / 3) / size)
    assert found.other == pytest.approx(0.2) and found.balance == pytest.approx(0.5)


def test_what_heads_learn_from(monkeypatch):
    """Fresh prompts of the law asked for, and the mean square of the query's error."""
    seen = []
    monkeypatch.setattr(icl_linear_regression, "fit", lambda *given, **options: seen.append((given, options)))
    law = {"sigma": 0.4, "rho": 0.3, "tasks": 2}
    model = train_regression(3, 4, 7, **law, normalizer="linear", steps=5, batch=6, lr=0.2, seed=9)
    (trained, draw, loss, steps), options = seen[0]
    assert trained is model and steps == 5 and options == {"lr": 0.2, "seed": 9} and model.normalizer == "linear"
    torch.manual_seed(9)
    assert torch.equal(model.q, RegressionHeads(4, 3, 2).q)
    found = draw(torch.Generator().manual_seed(1))
    truth = regression_prompts(6, 7, 4, **law, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    x, y, query, answer = truth
    assert float(loss(truth)) == pytest.approx(float(((model(x, y, query) - answer) ** 2).mean()))
    train_regression()
    usual = seen[1][0][1](torch.Generator().manual_seed(1))
    assert torch.equal(usual[1], regression_prompts(256, generator=torch.Generator().manual_seed(1))[1])
