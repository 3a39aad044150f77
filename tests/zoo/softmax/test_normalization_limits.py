"""Dispersion, separation, geometry and gradients of weights against loops, for every normalizer that has weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import regard
from regard.algebra import Weighted
from regard.zoo.softmax import normalization_limits as limits

NAMES = [name for name in regard.names() if isinstance(regard.get(name), Weighted)]


def logits(n: int = 12) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", [*NAMES, "relaxed-attention"])
def test_every_normalizer(name: str) -> None:
    found = limits.attention_limits(logits(), normalizer=name, tops=(1, 3), draws=2)
    assert all(math.isfinite(x) for x in (found.largest, found.smallest, found.jacobian, *found.separation, *found.distinct))


@pytest.mark.parametrize("name", ["idw-attention", "neural-attention", "qknorm", "tapa", "mqa", "neighborhood"])
def test_logits_are_given_so_scores_of_another_kind_have_no_part(name: str) -> None:
    torch.testing.assert_close(limits.normalised(logits(), name, 0.5), (logits() / 0.5).softmax(-1))


def test_scalings_of_rows_and_plain_functions() -> None:
    s = logits()
    torch.testing.assert_close(limits.normalised(s, "ssmax", 1.0), (0.43 * math.log(12) * s).softmax(-1))
    torch.testing.assert_close(limits.normalised(s, regard.get("sigmoid", bias=0.0), 2.0), torch.sigmoid(s / 2))
    f = 1 + (s / 2) ** 2
    torch.testing.assert_close(limits.normalised(s, lambda x: 1 + x * x, 2.0), f / f.sum())
    torch.testing.assert_close(limits.normalised(s, "relaxed-attention", 1.0), 0.9 * s.softmax(-1) + 0.1 / 12)


def test_recorded_weights_come_back_from_their_logarithms() -> None:
    w = logits().softmax(-1)
    torch.testing.assert_close(limits.normalised(w.log(), "softmax", 1.0), w)


def by_hand(a: Tensor, x: Tensor, chosen: tuple[int, ...]) -> tuple[float, float]:
    centre = sum(a[i] * x[i] for i in chosen)
    others = [j for j in range(len(a)) if j not in chosen]
    apart = sum(float((centre - a[j] * x[j]).norm()) for j in others)
    return apart, sum(float(a[j] * x[j].norm()) for j in others) + len(others) * float(centre.norm())


@pytest.mark.parametrize("radius", [None, 0.15])
def test_separation_its_bound_and_who_can_be_told_apart(radius: float | None) -> None:
    s, x = logits(), torch.randn(12, 5, dtype=torch.float64)
    found = limits.attention_limits(s, x, temperature=0.7, tops=(1, 2, 5), radius=radius)
    a = (s / 0.7).softmax(-1)
    reach = 2 * float(torch.stack([a[j] * x[j].norm() for j in range(12)]).mean()) if radius is None else radius
    for at, n in enumerate((1, 2, 5)):
        top = tuple(a.argsort(descending=True)[:n].tolist())
        apart, bound = by_hand(a, x, top)
        assert found.separation[at] == pytest.approx(apart, rel=1e-10)
        assert found.separation_bound[at] == pytest.approx(bound, rel=1e-10) and bound >= apart
        near = [float((a[j] * x[j] - sum(a[i] * x[i] for i in top)).norm()) <= reach for j in range(12)]
        alone = not any(near[j] for j in range(12) if j not in top)
        assert found.distinct[at] == pytest.approx(sum(near[i] for i in top) / n if alone else 0.0)
    assert (found.largest, found.smallest) == (float(a.max()), float(a.min())) and found.tops == (1, 2, 5)
    spread = float(s.abs().max())
    assert found.bounds == pytest.approx([1 / (1 + 11 * math.exp(2 * sign * spread / 0.7)) for sign in (1, -1)])
    assert found.jacobian_bound == pytest.approx(1 / 1.4)
    assert found.jacobian == pytest.approx(float(torch.linalg.matrix_norm((torch.diag(a) - torch.outer(a, a)) / 0.7, 2)))


def test_a_plot_has_all_three_lines() -> None:
    drawn = limits.attention_limits(logits(), tops=(1, 2, 5), draws=2, jacobian=False).plot()
    assert drawn.startswith("<svg") and all(name in drawn for name in ("separation", "bound", "random sets"))


def test_distinguishable_tokens() -> None:
    a, x = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, -8.0]])
    chosen = torch.tensor([True, True, False])  # s = (1, 1); distances 1, 1 and sqrt(10)
    assert limits.distinguishable(a, x, chosen, 1.0) == 1.0 and limits.distinguishable(a, x, chosen, 0.9) == 0.0
    assert limits.distinguishable(a, x, chosen, 3.2) == 0.0 and limits.distinguishable(a, x, torch.tensor([True, False, False]), 0.5) == 1.0
    assert limits.distinguishable(a, torch.tensor([[2.0, 0.0], [0.0, 8.0], [0.0, -8.0]]), chosen, 1.5) == 0.5


def test_random_sets_are_an_average_over_all_sets() -> None:
    s, x = logits(6), torch.randn(6, 3, dtype=torch.float64)
    a = s.softmax(-1)
    sets = [by_hand(a, x, chosen)[0] for chosen in itertools.combinations(range(6), 2)]
    found = limits.attention_limits(s, x, tops=(2,), draws=1500, jacobian=False)
    assert found.random_separation[0] == pytest.approx(sum(sets) / 15, rel=0.03) and math.isnan(found.jacobian)
    again = [limits.attention_limits(s, x, tops=(2,), draws=3, seed=seed).random_separation for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert limits.attention_limits(s, x, tops=(6,), draws=5).random_separation[0] == 0.0


def test_tokens_on_a_sphere_by_default() -> None:
    found, again = (limits.attention_limits(logits(20), tops=(1,)) for _ in range(2))
    assert found.separation == again.separation
    centre = 8 * found.largest  # |s| of one token of radius 8
    assert found.separation_bound[0] == pytest.approx(8 * (1 - found.largest) + 19 * centre)
    assert limits.attention_limits(logits(20)).tops == (1, 4, 16)


def test_the_critical_number() -> None:
    """Two samples of n values differ at level alpha when their distributions are sqrt(-log(alpha / 2) / n) apart."""
    rows, x = 4 * torch.randn(40, 30, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    peaked = rows.softmax(-1)
    assert limits.critical_top(peaked, x, (1, 2)) is None
    assert limits.critical_top(peaked, x, (1, 30)) == 30  # with all chosen nothing is left apart
    generator = torch.Generator().manual_seed(0)
    own, other = [], []
    for a in peaked:
        own.append(by_hand(a, x, tuple(a.argsort(descending=True)[:12].tolist()))[0])
        other.append(by_hand(a, x, tuple(torch.randperm(30, generator=generator)[:12].tolist()))[0])
    apart = max(abs(sum(y <= z for y in own) - sum(y <= z for y in other)) / 40 for z in own + other)
    level = 2 * math.exp(-apart * apart * 40)  # the alpha at which this distance is just reached
    assert limits.critical_top(peaked, x, (12,), alpha=level * 1.05) is None
    assert limits.critical_top(peaked, x, (12,), alpha=level * 0.95) == 12


def test_says_what_is_wrong() -> None:
    for make, words in (
        (lambda: limits.attention_limits(torch.ones(2, 3)), r"\(L,\)"),
        (lambda: limits.attention_limits(torch.ones(3), torch.ones(2, 3)), r"\(L, dim\)"),
        (lambda: limits.attention_limits(torch.ones(3), torch.ones(3)), r"\(L, dim\)"),
        (lambda: limits.attention_limits(torch.ones(3), tops=(4,)), "from 1 to L = 3"),
        (lambda: limits.attention_limits(torch.ones(3), tops=(0,)), "from 1 to L = 3"),
        (lambda: limits.attention_limits(torch.tensor([1.0, -math.inf]), tops=(1,)), "not finite"),
        (lambda: limits.attention_limits(torch.ones(3), normalizer="gla", tops=(1,)), "no weights of pairs"),
    ):
        with pytest.raises(regard.RegardError, match=words):
            make()
