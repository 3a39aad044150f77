"""Regressions that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis import icl_softmax_regression
from regard.zoo.analysis.icl_softmax_regression import (
    SoftmaxRegression,
    attention_prediction,
    closeness_experiment,
    prompts,
    trained_closeness,
)


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


def test_weights_of_prompts_have_a_length_of_one_half_in_any_dimension():
    keys, values, query, answer = prompts(200, 30, 9, torch.Generator().manual_seed(0))
    table = torch.cat((keys, torch.ones(200, 30, 1)), -1)
    x = torch.linalg.lstsq(table.double(), values.double().log()[..., None]).solution[:, :, 0]
    assert float(x[:, :9].square().sum(1).mean().sqrt()) == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close((x * torch.cat((query, torch.ones(200, 1)), 1)).sum(1).exp(), answer.double(), rtol=1e-3, atol=1e-3)


def test_predictions_by_hand():
    a, b, queries = (torch.randn(*size, dtype=torch.float64) for size in ((6, 3), (6,), (4, 3)))
    keys = a - a.mean(0)
    for kind in ("softmax", "linear"):
        found = attention_prediction(a, b, queries, 0.3, kind)
        for m in range(4):
            s = torch.stack([0.3 * (queries[m] * key).sum() for key in keys])
            w = s.exp() / s.exp().sum() if kind == "softmax" else (1 + s) / 6
            assert torch.allclose(found[m], (w @ b - b.mean()) / 0.3)
    assert torch.equal(attention_prediction(a, b, queries, 0.3), attention_prediction(a, b, queries, 0.3, "softmax"))


def test_closeness_by_hand():
    """Every number of the report, and its bounds."""
    a, b = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    found = closeness_experiment(a, b, lr=0.5, beta=0.1, queries=9, seed=4)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, generator=generator, dtype=torch.float64)
    points = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(0.5 * ((a @ at).softmax(0) - b).square().sum(), at)
    new = x - 0.5 * slope
    moved = (a @ x).softmax(0) - (a @ new).softmax(0)
    data = a + 0.5 * (a @ a.T).softmax(-1) @ (b[:, None] * a)
    shifted = (a @ x).softmax(0) - (data @ x).softmax(0)
    ours, theirs = attention_prediction(a, b, points, 0.1), (points @ ((a - a.mean(0)).T @ (b - 1 / 7))) / 7
    assert [found.weight_shift, found.data_shift] == pytest.approx([float(moved.norm()), float(shifted.norm())])
    assert found.weight_ratio == pytest.approx(float(moved.norm() / (0.5 * slope).norm()))
    assert found.data_ratio == pytest.approx(float(shifted.norm() / (data - a).norm()))
    assert found.weight_bound == pytest.approx(float(torch.linalg.svdvals(a)[0]) / 2) and found.data_bound == pytest.approx(
        float(x.norm()) / 2
    )
    assert found.weight_ratio <= found.weight_bound and found.data_ratio <= found.data_bound
    assert found.cosine == pytest.approx(float(ours @ theirs / (ours.norm() * theirs.norm())))
    assert found.relative == pytest.approx(float((ours - theirs).norm() / theirs.norm()))
    given = closeness_experiment(a, b, x, lr=0.5, beta=0.1, queries=9, seed=4)
    assert given.weight_shift == found.weight_shift and given.cosine != found.cosine


def test_a_layer_against_descent_by_hand(monkeypatch):
    """Without training: the numbers of the report from the fresh layer's outputs."""
    monkeypatch.setattr(icl_softmax_regression, "fit", lambda *given, **options: None)
    found = trained_closeness(6, 3, seed=2)
    keys, values, query, y = prompts(2000, 6, 3, torch.Generator().manual_seed(1001))
    assert torch.allclose(values.sum(1), torch.full((2000,), 6.0))
    query.requires_grad_()
    out = ((0.1 * torch.einsum("bnd,bd->bn", keys, query)).softmax(-1) * values).sum(1)
    step = ((keys - keys.mean(1, keepdim=True)) * (values - values.mean(1, keepdim=True))[..., None]).mean(1)
    mean, raw = values.mean(1), (query * step).sum(1)
    rate = torch.linalg.lstsq(raw.detach()[:, None], (y - mean)[:, None]).solution[0, 0]
    other = mean + rate * raw
    slope = torch.autograd.grad(out.sum(), query)[0]
    along = (slope * rate * step).sum(1) / (slope.norm(dim=1) * (rate * step).norm(dim=1))
    truth = {
        "error": (out - y).square().mean(),
        "descent": (other - y).square().mean(),
        "mean": (mean - y).square().mean(),
        "difference": (out - other).square().mean().sqrt(),
        "cosine": along.mean(),
        "norms": (slope.norm(dim=1) - (rate * step).norm(dim=1)).abs().mean(),
    }
    assert set(found) == set(truth) and all(found[name] == pytest.approx(float(x), rel=1e-4) for name, x in truth.items())
