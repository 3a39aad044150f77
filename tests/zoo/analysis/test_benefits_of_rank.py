"""Geometries and ranks that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis.benefits_of_rank import (
    RankedHeads,
    best_weights,
    nearest_points,
    perfect_head,
    random_heads,
    rank_benefit,
    rank_one_error,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_points(2, 4, 5, geometry="orthonormal"), "orthonormal"),
        (lambda: nearest_points(2, 4, 5, geometry="doubled"), "even"),
        (lambda: RankedHeads(4, 0, 1), "rank=0"),
        (lambda: rank_one_error(torch.ones(2, 3), torch.ones(2, 3)), r"\(H, 2\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_first_entries_and_the_perfect_head():
    torch.manual_seed(0)
    model = RankedHeads(12, 3, 40)
    for p, bound in ((model.q, (6 / 15) ** 0.5), (model.k, (6 / 15) ** 0.5), (model.vo, (6 / (40 * 12 + 12)) ** 0.5)):
        assert 0.97 * bound < float(p.abs().max()) <= bound
    for options, tau in (({}, 1e4), ({"tau": 3.0}, 3.0)):
        model = perfect_head(4, **options)
        assert (
            torch.equal(model.q[0], tau * torch.eye(4)) and torch.equal(model.k[0], torch.eye(4)) and torch.equal(model.vo[0], torch.eye(4))
        )
        x, y, _ = nearest_points(3, 4, 5, 2)
        assert torch.allclose(model(x, y), x @ (tau * x.mT @ y / 2).softmax(1), atol=1e-5)


def test_points_and_the_table_s_keys():
    for geometry in ("uniform", "orthonormal", "doubled"):
        x, y, nearest = nearest_points(4, 6, 4, 3, geometry, seed=1)
        assert x.shape == (4, 6, 4) and y.shape == nearest.shape == (4, 6, 3)
        assert torch.allclose(x.norm(dim=1), torch.ones(4, 4)) and torch.allclose(y.norm(dim=1), torch.ones(4, 3))
        for b in range(4):
            for n in range(3):
                assert torch.equal(nearest[b, :, n], x[b, :, max(range(4), key=lambda at, b=b, n=n: float(x[b, :, at] @ y[b, :, n]))])
    x, _, _ = nearest_points(2, 6, 4, geometry="orthonormal")
    assert torch.allclose(x.mT @ x, torch.eye(4).expand(2, 4, 4), atol=1e-6)
    x, _, _ = nearest_points(2, 6, 4, geometry="doubled")
    assert torch.equal(x[:, :, 2:], -x[:, :, :2])
    table = rank_benefit([1, 2], [3], points=(2, 4), dims=(4, 6), samples=60)
    assert set(table.errors) == {(r, h, n, d) for n in (2, 4) for d in (4, 6) for r, h in ((1, 3), (2, 3), (d, 1))}
    again = rank_benefit([1, 2], [3], points=(2,), dims=(6,), samples=60).errors
    other = rank_benefit([1], [3], points=(2,), dims=(6,), samples=60, seed=1).errors
    assert again == {key: table.errors[key] for key in again} and other[1, 3, 2, 6] != again[1, 3, 2, 6]
    fit, held = nearest_points(30, 6, 2, seed=0), nearest_points(30, 6, 2, seed=1)
    model = random_heads(6, 1, 3)
    best_weights(model, *fit)
    error = (model(*held[:2]) - held[2]).square().sum() / held[2].square().sum()
    assert again[1, 3, 2, 6] == pytest.approx(float(error), rel=1e-5)
