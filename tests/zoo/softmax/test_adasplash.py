"""Thresholds by Halley's method: the function along any dimension, few steps, blocks, refusals."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.algebra.thresholds import ActiveTiles
from regard.lab import naive
from regard.zoo.softmax.adasplash import entmax_halley


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_map(alpha: float, dim: int) -> None:
    z = 2 * torch.randn(5, 6, 7, dtype=torch.float64)
    moved = z.movedim(dim, -1)
    want = torch.stack([naive.entmax(row, alpha) for row in moved.flatten(0, 1)]).view(moved.shape).movedim(-1, dim)
    given = {} if alpha == 1.5 else {"alpha": alpha, "iterations": 30}
    torch.testing.assert_close(entmax_halley(z, **given, **({} if dim == -1 else {"dim": dim})), want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("alpha", [1.3, 1.7])
def test_gradients_are_implicit(alpha: float) -> None:
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entmax_halley(z, alpha, 30), (z,))


def test_steps_bring_the_threshold_nearer() -> None:
    z = 2 * torch.randn(20, 64, dtype=torch.float64)
    truth = torch.stack([naive.entmax(row, 1.5) for row in z])
    gaps = [naive.gap(entmax_halley(z, iterations=n), truth) for n in (1, 2, 3, 8)]
    assert gaps[0] > gaps[1] > 1e-12 > gaps[3] and gaps[2] < 1e-6
    assert torch.equal(entmax_halley(z), entmax_halley(z, 1.5, 8))


def test_the_mechanism_is_entmax_with_a_choice_of_tiles() -> None:
    assert regard.get("adasplash").select == ActiveTiles(1.5, 64, 8)
    assert regard.get("adasplash", alpha=1.3, block_size=16, iterations=5).select == ActiveTiles(1.3, 16, 5)
    assert regard.get("adasplash", alpha=1.3).normalizer == regard.get("entmax", alpha=1.3).normalizer


@pytest.mark.parametrize("wrong", [{"alpha": 1.0}, {"iterations": 0}])
def test_says_what_is_wrong(wrong: dict[str, float]) -> None:
    with pytest.raises(regard.RegardError, match="alpha > 1"):
        entmax_halley(torch.ones(3), **wrong)  # type: ignore[arg-type]
    entmax_halley(torch.ones(3), 1.5, 1)
