"""Limits of LoRA: bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.lora_computational_limits import Adapted, degree_for, lora_gradients, taylor


def made(**other):
    sizes = {"x1": (6, 3), "x2": (6, 3), "x3": (6, 3), "y": (6, 2), "w": (3, 3), "w_v": (3, 2), "a": (2, 3), "b": (3, 2)}
    return Adapted(**{name: torch.randn(other.get(name, size)) for name, size in sizes.items()})


def test_bad_input():
    for name, size in (("x2", (5, 3)), ("w", (3, 2)), ("b", (3, 3)), ("w_v", (2, 2)), ("y", (5, 2))):
        with pytest.raises(RegardError, match=name):
            made(**{name: size})
    for run in (lambda: lora_gradients(made(), 0), lambda: taylor(torch.ones(2), 0)):
        with pytest.raises(RegardError, match="expected at least 1"):
            run()
    with pytest.raises(RegardError, match="no degree up to 3"):
        degree_for(torch.randn(8, 8), 9.0, most=3)
    large = made()
    object.__setattr__(large, "w", large.w * 1000)
    with pytest.raises(RegardError, match="a higher degree"):
        lora_gradients(large, 1)
