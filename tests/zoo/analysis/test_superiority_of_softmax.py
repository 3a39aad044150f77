"""Rows of scores and families of inputs."""

import pytest
import torch

import regard
from regard.zoo.analysis.superiority_of_softmax import families, softmax_vs_linear, weights


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights(torch.ones(3), "sigmoid"), "normalizer"),
        (lambda: families(2, 2, True), "n=2"),
        (lambda: families(2, 8, True, a=1.0), "a=1.0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_margins_plot():
    assert "<svg" in softmax_vs_linear((8, 16), draws=4).plot()
