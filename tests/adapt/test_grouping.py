"""Groups of alike matrices: costs, merges, moves, and how many each set gets."""

import itertools

import pytest
import torch

from regard import RegardError
from regard.adapt.grouping import annealed, cost, distances, merges, numbered, shared_out


def test_costs_are_scatters():
    torch.manual_seed(0)
    w, x = torch.randn(5, 3, 4).double(), torch.randn(50, 4).double()
    for gram, given in ((None, torch.eye(4).double()), (x.T @ x / 50, x.T @ x / 50)):
        d = distances(w, gram)
        i, j = 1, 3
        assert abs(float(d[i, j]) - float(torch.trace((w[i] - w[j]) @ given @ (w[i] - w[j]).T))) < 1e-6
        groups, total = (0, 0, 1, 0, 1), 0.0
        for members in ([0, 1, 3], [2, 4]):
            mean = w[members].mean(0)
            total += sum(float(torch.trace((w[i] - mean) @ given @ (w[i] - mean).T)) for i in members)
        assert abs(cost(groups, d) - total) < 1e-6


def test_merges_and_moves_find_what_was_planted():
    torch.manual_seed(1)
    centres = torch.randn(3, 2, 2)
    groups = (0, 1, 1, 2, 0, 2, 1)
    d = distances(centres[list(groups)] + 0.01 * torch.randn(7, 2, 2))
    way = merges(d)
    assert [len(set(found)) for found, _ in way] == [7, 6, 5, 4, 3, 2, 1] and way[4][0] == numbered(groups)
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(way)) and way[0] == ((0, 1, 2, 3, 4, 5, 6), 0.0)
    assert annealed((0, 0, 0, 1, 1, 2, 2), d, steps=2000, seed=3) == numbered(groups)
    assert annealed((0, 1), d[:2, :2]) == (0, 1) and annealed((0, 0), d[:2, :2]) == (0, 0)
    assert annealed(numbered(groups), d) == numbered(groups)


def test_sets_that_merge_cheaply_get_fewer():
    torch.manual_seed(2)
    alike = distances(
        torch.randn(1, 2, 2)
        + 0.01 * torch.randn(4, 2, 2).index_fill(0, torch.tensor([3]), 1.0) * torch.tensor([1, 1, 1, 100.0])[:, None, None]
    )
    apart = distances(torch.randn(4, 2, 2))
    assert shared_out([alike, apart], 6) == [2, 4] and sum(shared_out([alike, apart], 5)) == 5
    for total in (1, 9):
        with pytest.raises(RegardError, match="from one a set"):
            shared_out([alike, apart], total)
