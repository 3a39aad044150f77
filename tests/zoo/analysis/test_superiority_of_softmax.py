"""Rows of scores and families of inputs."""

import math

import pytest
import torch

import regard
from regard.zoo.analysis.superiority_of_softmax import (
    Margins,
    best_threshold,
    families,
    head_output,
    softmax_vs_linear,
    trained_accuracy,
    weights,
)


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


def test_thresholds_and_slopes_by_hand():
    low, high = torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.3, 0.5, 0.7, 0.8])
    truth = max(((low <= t).double().mean() + (high > t).double().mean()) / 2 for t in torch.linspace(0, 1, 1001))
    assert best_threshold(low, high) == pytest.approx(float(truth)) and best_threshold(high, high) == 0.5
    margins = Margins((10, 1000), {"linear": (0.5, 0.005)}, {})
    assert margins.slope("linear") == pytest.approx(-1.0)


def test_accuracy_behind_noise_by_hand():
    for name, options, noise, tau in (
        ("softmax", {}, 0.05, 0.5),
        ("softmax", {"tau": 0.9, "noise": 0.3}, 0.3, 0.9),
        ("linear", {"noise": 0.3}, 0.3, None),
    ):
        found = softmax_vs_linear((16,), (name,), draws=50, seed=3, **options)
        low, high = (head_output(*families(50, 16, strong, seed=3 + strong), name) for strong in (False, True))
        assert found.margin[name] == pytest.approx((float(high.min() - low.max()),))
        generator = torch.Generator().manual_seed(4)
        low, high = (x + noise * torch.randn(50, generator=generator, dtype=x.dtype) for x in (low, high))
        fixed = ((low <= tau).double().mean() + (high > tau).double().mean()) / 2 if tau else best_threshold(low, high)
        assert found.accuracy[name] == pytest.approx((float(fixed),))


def test_families_by_hand():
    for cross in (False, True):
        queries, keys = families(40, 9, True, a=4.0, c=1.0, jitter=0.5, dim=5, cross=cross, seed=1)
        assert queries.shape == ((40, 1, 5) if cross else (40, 9, 5)) and keys.shape == (40, 9, 5) and keys.dtype == torch.float64
        marked = keys[..., 1] == 1
        assert bool((marked.sum(1) == 1).all()) and bool((keys[..., 0][marked] == 4).all()) and not marked[:, -1].any()
        rest = keys[..., 0][~marked]
        assert float((rest - 1).abs().max()) * math.log(9) <= 0.5 and float((rest - 1).abs().max()) * math.log(9) > 0.45
        assert bool((queries[:, -1, 2] == 1).all()) and 0.08 < float(keys[..., 3:].std()) < 0.12
        if not cross:
            assert not keys[:, :-1, 2].any()
    assert not families(5, 9, False)[1][..., 1].any()


def test_a_trained_head_by_its_options():
    first = trained_accuracy("linear", 16, 32, steps=3, draws=20)
    assert all(0 <= x <= 1 for x in first) and first == trained_accuracy("linear", 16, 32, steps=3, draws=20)
    clear, blurred = (trained_accuracy("softmax", 16, 32, noise=noise, steps=20, draws=40) for noise in (0.0, 5.0))
    assert min(clear) > 0.95 and max(blurred) < 0.8
