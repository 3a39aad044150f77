"""Checks of icl-linear-regression."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
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


def prompts(count: int, length: int = 40, seed: int = 0, rho: float = 0.0) -> tuple[Tensor, ...]:
    return regression_prompts(count, length, 5, rho=rho, generator=torch.Generator().manual_seed(seed), dtype=F64)


@check(
    "icl-linear-regression",
    "heads (+w, -w): relative distance to debiased descent at w = 0.05, if it falls four times a halving",
    below=0.01,
    control="to plain descent",
)
def _() -> tuple[float, float]:
    x, y, q, _ = prompts(400)

    def gap(w: float, debiased: bool) -> float:
        model = planted_heads(torch.tensor([w, -w], dtype=F64), torch.tensor([1.0, -1.0], dtype=F64), 5)
        truth = descent(x, y, q, 2 * w, debiased)
        return float((model(x, y, q) - truth).detach().norm() / truth.norm())

    errors = [gap(w, True) for w in (0.2, 0.1, 0.05)]
    quartering = all(3.4 < a / b < 4.6 for a, b in itertools.pairwise(errors))
    return errors[-1] if quartering else 1.0, gap(0.05, False)


@check(
    "icl-linear-regression",
    "the layer of three heads and two tasks, descent and ridge by loops",
    below=1e-10,
    control="the query among the keys",
)
def _() -> tuple[float, float]:
    gaps, other = [], 0.0
    for kind in ("softmax", "linear"):
        model = RegressionHeads(4, 3, 2, kind).to(F64)
        x, y, q, _ = regression_prompts(2, 6, 4, tasks=2, generator=torch.Generator().manual_seed(0), dtype=F64)
        truth, with_query = torch.zeros(2, 2, dtype=F64), torch.zeros(2, 2, dtype=F64)
        for b in range(2):
            rows = [torch.cat((x[b, t], y[b, t])) for t in range(6)]
            asked = torch.cat((q[b], torch.zeros(2, dtype=F64)))
            for h in range(3):
                for into, keys in ((truth, rows), (with_query, [*rows, asked])):
                    s = torch.stack([(model.k[h] @ r) @ (model.q[h] @ asked) / 6**0.5 for r in keys])
                    w = s.exp() / s.exp().sum() if kind == "softmax" else s / len(keys)
                    into[b] += model.out[h].detach() @ (model.v[h] @ sum(w[t] * r for t, r in enumerate(keys))).detach()
        gaps.append(naive.gap(model(x, y, q), truth))
        other = naive.gap(model(x, y, q), with_query)
        plain, centred, penalised = (torch.zeros(2, 2, dtype=F64) for _ in range(3))
        for b in range(2):
            for t in range(6):
                plain[b] += 0.3 / 6 * y[b, t] * (x[b, t] @ q[b])
                centred[b] += 0.3 / 6 * y[b, t] * ((x[b, t] - x[b].mean(0)) @ q[b])
            penalised[b] = q[b] @ torch.linalg.inv(x[b].T @ x[b] + 0.7 * torch.eye(4, dtype=F64)) @ x[b].T @ y[b]
        gaps += [
            naive.gap(descent(x, y, q, 0.3, False), plain),
            naive.gap(descent(x, y, q, 0.3), centred),
            naive.gap(ridge(x, y, q, 0.7), penalised),
        ]
    return max(gaps), other


@check(
    "icl-linear-regression",
    "approximate risk against 20000 prompts (small weights); its best mu against its neighbours",
    below=0.03,
    control="without the exponential",
)
def _() -> tuple[float, float]:
    omega = torch.tensor([0.15, -0.15], dtype=F64)
    mu = best_mu(omega, 40, 5, 0.1)
    x, y, q, target = prompts(20_000, seed=3)
    seen = float((planted_heads(omega, mu, 5)(x, y, q) - target).square().mean())
    said = float(approximate_risk(omega, mu, 40, 5, 0.1))
    nearby = [float(approximate_risk(omega, mu + step, 40, 5, 0.1)) for step in 0.1 * torch.randn(20, 2, dtype=F64)]
    flat = 1.01 - 2 * float(mu @ omega) + float(mu @ torch.outer(omega, omega) @ mu)
    return abs(said - seen) if min(nearby) > said else 1.0, abs(flat - seen)


@functools.cache
def trained(heads: int) -> RegressionHeads:
    return train_regression(heads, steps=1500, batch=128, lr=5e-3)


def error(model: RegressionHeads, length: int = 40) -> float:
    x, y, q, target = (t.float() for t in prompts(4000, length, seed=9))
    with torch.no_grad():
        return float((model(x, y, q) - target).square().mean())


@check(
    "icl-linear-regression",
    "trained: error of two heads over that of one (above ridge's, and falling with longer prompts)",
    below=0.6,
    control="two heads against two",
)
def _() -> tuple[float, float]:
    one, two = error(trained(1)), error(trained(2))
    x, y, q, target = prompts(4000, seed=9)
    bayes = float((ridge(x, y, q, 0.05) - target).square().mean())
    good = bayes < two and error(trained(2), 80) < two
    return two / one if good else 1.0, error(train_regression(2, steps=1500, batch=128, lr=5e-3, seed=1)) / two


@check(
    "icl-linear-regression",
    "trained two heads: purity, the largest of off-diagonal KQ / omega, spread of the diagonal, rest of OV / mu, |sum mu| / |mu| (omega of two signs)",
    below=0.25,
    control="before training",
)
def _() -> tuple[float, float]:
    def purity(model: RegressionHeads) -> float:
        p = head_pattern(model)
        opposite = float(p.omega[0] * p.omega[1]) < 0 and bool(
            (p.omega.sign() == p.mu.sign()).all() or (p.omega.sign() == -p.mu.sign()).all()
        )
        return max(p.off, p.spread, p.other, p.balance) if opposite else 10.0

    torch.manual_seed(0)
    return purity(trained(2)), purity(RegressionHeads(5, 2))
