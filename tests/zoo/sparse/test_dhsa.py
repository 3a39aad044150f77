"""Borders of DHSA's chunks: which gaps are chosen, what their loss is, and which tokens a block of queries reads."""

from __future__ import annotations

import math

import pytest
import torch

from regard.zoo.sparse.dhsa import boundary_loss, choose_boundaries, indices, mass_ratio

SCORES = torch.tensor([[0.9, 0.2, 0.5, 0.5, 0.1, 0.8, 0.7, 0.95]])


@pytest.mark.parametrize(
    ("theta", "options", "starts"),
    [
        (0.5, {"distance": 2}, [0, 1, 6]),  # 0.7 lies beside 0.8; 0.5 is not above the threshold; the last gap has nothing behind it
        (0.5, {"distance": 1}, [0, 1, 6, 7]),
        (0.4, {"distance": 2}, [0, 1, 3, 6]),  # of equals the first
        (0.4, {"distance": 3}, [0, 1, 6]),  # 2 from the first, 2 from the third
        (0.4, {"distance": 3, "forced": (3,)}, [0, 3, 6]),
        (0.0, {"distance": 2, "instruction": 4}, [0, 1, 3, 5]),  # the gap 8 - 4 first, none behind it
        (0.0, {"distance": 1, "instruction": 4, "forced": (2,)}, [0, 1, 2, 3, 5]),
    ],
)
def test_gaps_are_taken_best_first(theta: float, options: dict[str, int], starts: list[int]) -> None:
    found = choose_boundaries(SCORES, theta, 4, **options)
    assert found.dtype == torch.bool and found[0].nonzero().flatten().tolist() == starts
    fewer = choose_boundaries(SCORES, theta, 1, **options)[0].nonzero().flatten().tolist()
    forced = len(options.get("forced", ())) + ("instruction" in options)
    assert len(fewer) == 1 + max(1, forced) and set(fewer) <= set(starts)


def test_each_text_chooses_alone() -> None:
    both = choose_boundaries(torch.cat((SCORES, SCORES.flip(1))), 0.5, 4, 2)
    for row, scores in zip(both, (SCORES, SCORES.flip(1)), strict=True):
        assert torch.equal(row, choose_boundaries(scores, 0.5, 4, 2)[0])


@pytest.mark.parametrize("options", [{}, {"alpha": 2.0, "beta": 0.3, "gamma": 1.5, "eps": 0.1}])
def test_loss_gap_by_gap(options: dict[str, float]) -> None:
    alpha, beta, gamma, eps = (options.get(name, usual) for name, usual in (("alpha", 4.0), ("beta", 0.0), ("gamma", 2.0), ("eps", 1e-6)))
    torch.manual_seed(0)
    logits, ratio = torch.randn(2, 5, dtype=torch.float64), 1 + torch.rand(2, 5, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    terms = torch.zeros(2, 5, dtype=torch.float64)
    for b in range(2):
        for t in range(5):
            y = 1 / (1 + math.exp(-alpha * (math.log(float(ratio[b, t]) + eps) - beta)))
            p = 1 / (1 + math.exp(-float(logits[b, t])))
            terms[b, t] = (y * (1 - p) + (1 - y) * p) ** gamma * -(y * math.log(p) + (1 - y) * math.log(1 - p))
    assert float(boundary_loss(logits, ratio, **options)) == pytest.approx(float(terms.mean()))
    assert float(boundary_loss(logits, ratio, real, **options)) == pytest.approx(float(terms[real].mean()))
    assert float(boundary_loss(logits, ratio, real & False)) == 0


def test_masses_of_few_rows_and_wide_windows() -> None:
    """rows: how many late rows count; eps weighs against empty windows."""
    torch.manual_seed(0)
    p = torch.randn(1, 2, 12, 12, dtype=torch.float64).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    a, found = p[0].mean(0), mass_ratio(p, 2, 3, 0.1)[0]
    for t in range(12):
        late = range(min(t + 2, 12), min(t + 5, 12))
        past = sum(float(a[i, j]) for i in late for j in range(max(0, t - 1), t + 1))
        future = sum(float(a[i, j]) for i in late for j in range(t + 1, min(t + 3, 12)))
        assert float(found[t]) == pytest.approx((max(past, future) + 0.1) / (min(past, future) + 0.1))


def test_tokens_are_listed_in_order() -> None:
    keep = torch.tensor([[[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]], dtype=torch.bool)
    assert indices(keep, 3).tolist() == [[[0, 2, 3], [4, -1, -1], [-1, -1, -1]]]
