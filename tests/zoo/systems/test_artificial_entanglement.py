"""Entanglement of matrices: half precision, bad input."""

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.zoo.systems.artificial_entanglement import MPSAdapter, attention_entanglement, entanglement_profile, no_hair


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
