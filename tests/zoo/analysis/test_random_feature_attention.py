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


def test_features_and_first_weights_by_hand():
    acts = {
        "relu": lambda t: t.clamp_min(0),
        "tanh": torch.tanh,
        "identity": lambda t: t,
        "gelu": lambda t: t * (1 + torch.erf(t / 2**0.5)) / 2,
    }
    x0, x = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    for sigma, act in acts.items():
        model = RandomFeatureAttention(3, 5, sigma, seed=2, dtype=torch.float64)
        phi = model.features(x0, x)
        for b in range(2):
            for m in range(5):
                total = torch.zeros(4, dtype=torch.float64)
                for n in range(4):
                    key = torch.cat((x[b, n], torch.ones(1)))
                    total += act(torch.cat((x0[b], torch.ones(1))) @ model.matrices[m] @ key) * key / 4
                assert torch.allclose(phi[b, 4 * m : 4 * m + 4], total)
    for options, spread, mean in (
        ({}, 0.5, 0.0),
        ({"bias": 2.0}, 0.25, 2.0),
        ({"bias": 2.0, "std": 0.1}, 0.1, 2.0),
        ({"std": 3.0}, 3.0, 0.0),
    ):
        w = RandomFeatureAttention(7, 400, **options).matrices.clone()
        own = w[:, range(7), range(7)]
        assert abs(float(own.mean()) - mean) < 0.1 * spread and abs(float(w[:, 7].mean())) < 0.1 * spread
        w[:, range(7), range(7)] -= mean
        assert abs(float(w.std()) / spread - 1) < 0.03
    given = torch.randn(2, 4, 4)
    assert torch.equal(RandomFeatureAttention(3, matrices=given).matrices, given)
    rival = RandomFeatureMLP(7, 5, 40, dtype=torch.float64)
    assert rival.weight.shape == (40 * 8, 43) and abs(float(rival.weight.std()) * 43**0.5 - 1) < 0.03
    flat = torch.cat((x0, x.flatten(1), torch.ones(2, 1)), 1)
    rival = RandomFeatureMLP(3, 4, width=6, dtype=torch.float64)
    assert torch.allclose(rival.features(x0, x), (flat @ rival.weight.T).relu()) and not torch.equal(
        rival.weight, RandomFeatureMLP(3, 4, width=6, seed=1, dtype=torch.float64).weight
    )


def test_ridge_takes_the_strength_of_the_least_error():
    x0, x, y = drawn("f1", 40, 3, 4, dtype=torch.float64)
    model = RandomFeatureAttention(3, 2, dtype=torch.float64)
    phi, strengths = model.features(x0, x), (1e-6, 1e-2, 10.0)

    def solved(rows, target, strength):
        return torch.linalg.solve(rows.T @ rows + strength * torch.eye(rows.shape[1], dtype=rows.dtype), rows.T @ target)

    for held_out in (0.2, 0.5):
        cut = 40 - round(40 * held_out)
        errors = [float((phi[cut:] @ solved(phi[:cut], y[:cut], s) - y[cut:]).square().mean()) for s in strengths]
        best = strengths[errors.index(min(errors))]
        assert model.fit(x0, x, y, strengths, held_out) == best
        assert torch.allclose(model(x0, x), phi @ solved(phi, y, best), atol=1e-6)
    assert model.fit(x0, x, y, (10.0,)) == 10.0


def test_targets_and_draws():
    x0, x, y = drawn("f3", 200, 5, 6, power=3, seed=4)
    assert x0.shape == (200, 5) and x.shape == (200, 6, 5) and torch.allclose(x.norm(dim=-1), torch.ones(200, 6))
    direction = torch.nn.functional.normalize(torch.randn(5, generator=torch.Generator().manual_seed(17)), dim=0)
    near, along = (x0[:, None] * x).sum(-1), x @ direction
    assert torch.allclose(y, (near**3 * along).mean(1), atol=1e-6)
    for name, own in (("f1", along), ("f2", near)):
        assert torch.allclose(target(name, x0, x, direction), (own**2).mean(1), atol=1e-6)
        assert torch.allclose(target(name, x0, x, direction, 5), (own**5).mean(1), atol=1e-6)
    assert drawn("f1", 3)[1].shape == (3, 16, 16)
    train, test = drawn("f1", 30, 3, 4), drawn("f1", 20, 3, 4, seed=1)
    model = RandomFeatureAttention(3, 2)
    found = sample_complexity_curve(model, train, test, (10, 30))
    error = (model(*test[:2]) - test[2]).square().mean() / (test[2] - test[2].mean()).square().sum() * 19
    assert found.sizes == (10, 30) and found.errors[1] == pytest.approx(float(error), rel=1e-4)
