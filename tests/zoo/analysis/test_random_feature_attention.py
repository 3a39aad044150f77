"""Shapes, seeds and curves."""

import pytest
import torch

import regard
from regard.zoo.analysis.random_feature_attention import RandomFeatureAttention, RandomFeatureMLP, drawn, sample_complexity_curve, target


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomFeatureAttention(3, sigma="exp"), "sigma"),
        (lambda: RandomFeatureAttention(3, matrices=torch.ones(2, 3, 3)), "matrices"),
        (lambda: RandomFeatureAttention(3, 4)(torch.ones(2, 4), torch.ones(2, 5, 4)), "d = 3"),
        (lambda: RandomFeatureMLP(3, 4, 5)(torch.ones(2, 3), torch.ones(2, 5, 3)), "expected 15"),
        (lambda: RandomFeatureAttention(3, 4).fit(*drawn("f1", 5, 3, 2), ridge=[0.0]), "ridge"),
        (lambda: target("f4", torch.ones(1, 2), torch.ones(1, 3, 2), torch.ones(2)), "f4"),
        (lambda: sample_complexity_curve(RandomFeatureAttention(3, 4), drawn("f1", 5, 3, 2), drawn("f1", 5, 3, 2), [6]), "sizes"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_curves_plot():
    train, test = drawn("f1", 20, 3, 2), drawn("f1", 5, 3, 2)
    assert "<svg" in sample_complexity_curve(RandomFeatureAttention(3, 4), train, test, [10, 20]).plot()


def test_biased_samples_differ_and_seeds_repeat():
    first, again, other = (RandomFeatureAttention(4, 6, bias=b, seed=s).matrices for b, s in ((1.0, 0), (1.0, 0), (0.0, 0)))
    assert torch.equal(first, again) and not torch.equal(first, other)
