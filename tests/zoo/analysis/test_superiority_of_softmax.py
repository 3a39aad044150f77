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


def test_margins_are_those_of_the_scores_that_were_given():
    found = softmax_vs_linear((64,), ("linear",), draws=4, a=3.0, c=1.5).margin["linear"][0]
    assert found == pytest.approx(3 / (3 + 63 * 1.5), rel=0.15)
    first, second = (families(3, 8, True, seed=s)[1] for s in (0, 1))
    assert not torch.equal(first, second)
