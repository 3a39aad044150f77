"""Limits of LoRA: bad input."""

import math

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.lora_computational_limits import Adapted, degree_for, lora_gradients, lora_limits, taylor


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


def test_the_least_degree_by_hand():
    s = torch.randn(6, 6, dtype=torch.float64)
    for gamma, error in ((0.5, 1e-3), (3.0, 1e-3), (3.0, 0.2)):
        x = s * gamma / float(s.abs().max())
        gaps = []
        for degree in range(1, 30):
            u = sum(x**n / float(math.factorial(n)) for n in range(degree + 1))
            gaps.append(6 * float((u / u.sum(1, keepdim=True) - x.softmax(1)).abs().max()))
        truth = next(n for n, gap in enumerate(gaps, 1) if gap < error)
        assert degree_for(s, gamma, error) == truth
        (row,) = lora_limits(s, 2, (gamma,), error)
        rank = math.comb(2 + truth, truth)
        assert row == {"gamma": gamma, "degree": truth, "rank": rank, "worthwhile": float(rank < 6)}
    assert degree_for(s, 3.0) == degree_for(s, 3.0, 1e-3) and [row["gamma"] for row in lora_limits(s, 2)] == [0.5, 1, 2, 4, 6, 8]
    assert made().scale == 0.5 and Adapted(**{**vars(made()), "alpha": 4.0}).scale == 2.0
