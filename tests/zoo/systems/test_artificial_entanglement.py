"""Entanglement of matrices: half precision, bad input."""

import math

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.zoo.systems.artificial_entanglement import MPSAdapter, attention_entanglement, entanglement_profile, factors, no_hair


def test_half_precision_and_batches():
    m = torch.randn(3, 8, 8)
    assert torch.allclose(entanglement_profile(m)[1], entanglement_profile(m[1])) and entanglement_profile(m).shape == (3, 5)
    assert (entanglement_profile(m.bfloat16()) - entanglement_profile(m)).abs().max() < 0.02


def test_bad_input():
    for bad, why in (
        (torch.zeros(4, 4), "all zeros"),
        (torch.full((2, 2), float("nan")), "finite"),
        (torch.ones(4), "finite numbers"),
        (torch.ones(2, 2).long(), "finite"),
    ):
        with pytest.raises(RegardError, match=why):
            entanglement_profile(bad)
    with pytest.raises(RegardError, match="multiply to 4 and 6"):
        entanglement_profile(torch.ones(4, 6), rows=[3])
    with pytest.raises(RegardError, match="B, H, Lq, Lk"):
        attention_entanglement(torch.ones(2, 2))
    for bad in ({"bond": 0}, {"bond": 2, "outs": [3, 2]}):
        with pytest.raises(RegardError, match="multiply to 8 and 12"):
            MPSAdapter(nn.Linear(12, 8), **bad)
    with pytest.raises(RegardError, match="at least one"):
        no_hair([], [], (torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)))


def test_two_ways_of_fine_tuning_compared():
    """Entropies known in closed form: a matrix with k equal singular values at its middle cut has log k."""
    two, four, one = torch.diag(torch.tensor([1.0, 1, 0, 0])), torch.eye(4), torch.ones(4, 4)
    maps = torch.stack([torch.stack([two, four])]), torch.stack([torch.stack([one, two])])  # (1, 2, 4, 4)
    found = no_hair([four, one], [one, one], maps)
    own = entanglement_profile(four)  # cuts of ones share nothing
    assert own[1] == pytest.approx(math.log(4)) and entanglement_profile(one).abs().max() < 1e-9
    assert found["internal"] == pytest.approx(float(own.mean()) / 2) and found["internal_scale"] == pytest.approx(float(own.mean()) / 4)
    assert found["external"] == pytest.approx(math.log(2)) and found["external_scale"] == pytest.approx(math.log(2))


def test_legs():
    assert [factors(n) for n in (1, 2, 9, 60, 97)] == [[1], [2], [3, 3], [2, 2, 3, 5], [97]]
    m = torch.randn(6, 4, dtype=torch.float64)
    assert torch.allclose(entanglement_profile(m, cols=[4])[1], entanglement_profile(m, rows=[6])[0])
    assert [tuple(c.shape) for c in MPSAdapter(nn.Linear(8, 3), 2).cores] == [(1, 1, 2, 2), (2, 1, 2, 2), (2, 3, 2, 1)]
    layer = MPSAdapter(nn.Linear(4, 6), 2, outs=[6], ins=[4])
    layer.cores[0].data.normal_()
    assert torch.allclose(layer.update(), layer.cores[0][0, :, :, 0]) and layer.alpha == 1
