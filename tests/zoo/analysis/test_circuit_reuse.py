"""Circuits and repairs that there cannot be are refused."""

import pytest
import torch

import regard
from regard.interpret import circuit_overlap, repair


def test_bad_input_is_refused():
    model = regard.nn.Decoder(vocab=30, dim=32, layers=2, heads=4).eval()
    with pytest.raises(regard.RegardError, match="rows holds"), repair(model, {(0, 0): torch.tensor([[99]] * 4)}):
        model(torch.randint(30, (4, 9)))
    with pytest.raises(regard.RegardError, match="no heads"):
        circuit_overlap([], [(0, 0)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
