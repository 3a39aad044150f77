"""Regressions that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis.icl_softmax_regression import SoftmaxRegression, attention_prediction, prompts


def test_regressions_of_bad_shapes_are_refused():
    for call, message in (
        (lambda: SoftmaxRegression(torch.ones(3, 2), torch.ones(2)), "expected"),
        (lambda: attention_prediction(torch.ones(3, 2), torch.ones(3), torch.ones(1, 2), 0.0), "beta"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()


def test_prompts_hang_on_their_generator_alone():
    first, again, other = (prompts(3, 5, 2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
