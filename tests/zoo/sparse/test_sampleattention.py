"""Columns of grouped heads, masses under a scale, and what the tuner is given."""

from __future__ import annotations

import math

import pytest
import torch

from regard.zoo.sparse.sampleattention import column_set, cra, plan_columns, tune


def given(length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, length, 6, dtype=torch.float64), torch.randn(2, 2, length, 6, dtype=torch.float64)
    k[:, :, [3, 11, 17]] *= 4
    return 2 * q, k


def probabilities(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    length = q.shape[2]
    s = (scale * q @ k.repeat_interleave(2, 1).mT).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    return s.softmax(-1)


@pytest.mark.parametrize(("row_ratio", "window"), [(0.05, 3), (0.3, 5), (1.0, 8), (0.001, 3)])
@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.95])
def test_the_fewest_columns_that_lift_the_kept_mass(row_ratio: float, window: int, alpha: float) -> None:
    q, k = given()
    p, count = probabilities(q, k, 1.0), max(1, round(row_ratio * 40))
    rows = [round(x) for x in torch.linspace(40 / count - 1, 39, count, dtype=torch.float64).tolist()]
    found, (ranked, needed) = column_set(q, k, alpha, row_ratio, window), plan_columns(q, k, alpha, row_ratio, window)
    for b in range(2):
        for h in range(4):
            mass = [sum(float(p[b, h, i, j]) for i in rows if i - j >= window) for j in range(40)]
            kept, chosen = sum(float(p[b, h, i, j]) for i in rows for j in range(40) if i - j < window), []
            for j in sorted(range(40), key=lambda j: -mass[j]):
                if kept >= alpha * count:
                    break
                kept += mass[j]
                chosen.append(j)
            assert found[b, h].nonzero()[:, 0].tolist() == sorted(chosen) and int(needed[b, h]) == len(chosen)
            assert ranked[b, h, : len(chosen)].tolist() == chosen


def test_mass_that_is_kept_of_grouped_heads() -> None:
    q, k = given()
    keep = torch.rand(2, 4, 40, 40) < 0.3
    for options, scale in (({}, 6**-0.5), ({"scale": 0.2}, 0.2)):
        p = probabilities(q, k, scale)
        torch.testing.assert_close(cra(q, k, keep, **options), (p * keep).sum(-1))
        torch.testing.assert_close(cra(q, k, keep[:1, :1], **options), (p * keep[:1, :1]).sum(-1))


@pytest.mark.parametrize(
    "options", [{"row_ratio": 0.3}, {"window_ratio": 0.25}, {"window_ratio": 0.001}, {"row_ratio": 0.1, "window_ratio": 0.15}]
)
def test_the_tuner_measures_under_the_settings_it_is_given(options: dict[str, float]) -> None:
    q, k = given()
    rows, window = options.get("row_ratio", 0.05), max(1, round(40 * options.get("window_ratio", 0.08)))
    at, means = torch.arange(40), []
    for alpha in (0.4, 0.6, 0.8):
        keep = column_set(q * 6**-0.5, k, alpha, rows, window)[..., None, :] | (at[:, None] - at < window)
        means.append(float(cra(q, k, keep).mean()))
    alphas = (0.8, 0.4, 0.6)
    for alpha, mean in zip((0.4, 0.6, 0.8), means, strict=True):
        if alpha == 0.4 or mean > max(m for a, m in zip((0.4, 0.6, 0.8), means, strict=True) if a < alpha):
            assert tune(q, k, alphas, mean, **options) == alpha
    assert tune(q, k, alphas, 2.0, **options) == 0.8 and tune(q, k, alphas, 0.0, **options) == 0.4
