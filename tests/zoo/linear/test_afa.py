"""Adaptive filter attention where nothing decays, under other masks, at its first values, and what it cannot take."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard import RegardError, Window
from regard.lab.checks.linear.afa import filter_inputs, filter_truth
from regard.zoo.linear.afa import AdaptiveFilterAttention, adaptive_filter, description, propagated

F64 = torch.float64


@pytest.mark.parametrize("mu", [0.0, 1e-9, 3e-7])
def test_without_decay_noise_grows_with_time(mu: float) -> None:
    rate, gap = torch.tensor(mu, dtype=F64, requires_grad=True), torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    sigma2, eta2, gamma2 = (torch.tensor(x, dtype=F64) for x in (0.7, 0.2, 0.1))
    fade, variance = propagated(gap, rate, sigma2, eta2, gamma2)
    torch.testing.assert_close(variance, 0.7 * gap + 0.3, atol=1e-5, rtol=0)
    torch.testing.assert_close(fade, torch.exp(-mu * gap))
    slope = torch.autograd.grad(variance.sum(), rate)[0]
    assert slope.isfinite() and -4 * float(gap.square().sum()) < float(slope) < 0


def test_a_window_and_both_directions() -> None:
    torch.manual_seed(0)
    inputs, (q, k, v), times = filter_inputs(n=7)
    truth = filter_truth(inputs, q, k, v, times)
    near = adaptive_filter(q, k, v, times, mask=regard.Causal() & Window(2), diagnostics=True, **inputs)  # type: ignore[arg-type]
    assert near.weights is not None and near.total is not None
    at = torch.arange(7)
    seen = (at[:, None] >= at) & (at[:, None] - at < 2)
    share = truth.weights * seen
    torch.testing.assert_close(near.weights, share / share.sum(-1, keepdim=True))
    torch.testing.assert_close(near.total, truth.total + share.sum(-1).log())
    whole = adaptive_filter(q, k, v, times, mask=regard.Full(), diagnostics=True, **inputs)  # type: ignore[arg-type]
    assert whole.weights is not None and whole.variance is not None
    assert bool((whole.weights > 0).all()) and torch.equal(whole.variance, whole.variance.mT)
    torch.testing.assert_close(whole.weights.sum(-1), torch.ones(2, 2, 7, dtype=F64))
    past = whole.weights.tril()
    torch.testing.assert_close(past / past.sum(-1, keepdim=True), truth.weights)
    bare = adaptive_filter(q, k, v, times, **inputs)  # type: ignore[arg-type]
    assert bare.weights is bare.total is bare.variance is None


def test_numbers_count_for_every_head_and_times_for_every_row() -> None:
    torch.manual_seed(0)
    inputs, (q, k, v), times = filter_inputs(n=5)
    numbers = {"mu": 0.3, "sigma2": 0.2, "eta2": 0.1, "gamma2": 0.4, "nu": 2.0, "tau2": 1.5}
    wide = {name: torch.full((2,), value, dtype=F64) for name, value in numbers.items()}
    one = adaptive_filter(q, k, v, times[0], omega=inputs["omega"], **numbers).output  # type: ignore[arg-type]
    two = filter_truth({**wide, "omega": inputs["omega"]}, q, k, v, times[:1].expand(2, -1)).out
    torch.testing.assert_close(one, two)


def test_what_it_cannot_take() -> None:
    inputs, (q, k, v), times = filter_inputs(n=5)
    for at in range(3):
        given = [x.real if at == place else x for place, x in enumerate((q, k, v))]
        with pytest.raises(RegardError, match="expected complex"):
            adaptive_filter(*given, times, **inputs)  # type: ignore[arg-type]
    for wrong in (times[:, :4], times[:1], times[0, :4]):
        with pytest.raises(RegardError, match=r"times has shape .*; expected \(2, 5\)"):
            adaptive_filter(q, k, v, wrong, **inputs)  # type: ignore[arg-type]
    with pytest.raises(RegardError, match="frequencies='other'"):
        AdaptiveFilterAttention(8, frequencies="other")


def test_first_values_and_sizes() -> None:
    torch.manual_seed(0)
    layer = AdaptiveFilterAttention(96, 3, context_len=20)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    heads = dict.fromkeys(("decay", "process", "measured", "anchor", "robustness", "temperature"), (3,))
    linear = {f"{name}.weight": (192, 96) for name in "qkv"} | {f"{name}.bias": (192,) for name in "qkv"}
    assert shapes == {"turns": (3, 32), "out.weight": (96, 192), "out.bias": (96,)} | heads | linear
    torch.testing.assert_close(layer.mu, torch.full((3,), 0.125 + 1e-5))
    assert layer.turns is not None and float(layer.turns.detach().std()) == pytest.approx(0.5, rel=0.2)
    torch.testing.assert_close(layer.omega, layer.turns * math.pi / 2)
    assert AdaptiveFilterAttention(2, 4).d == 1 and AdaptiveFilterAttention(7, 2, frequencies="rope").turns is None
    fixed = AdaptiveFilterAttention(8, 2, frequencies="rope")
    torch.testing.assert_close(fixed.omega, torch.tensor([[1.0, 0.1, 0.01, 0.001]] * 2))


def test_half_precision_filters_in_float32() -> None:
    torch.manual_seed(0)
    layer, x = AdaptiveFilterAttention(8, 2, gated=True), torch.randn(1, 300, 8)
    exact, half = layer(x), layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)
    found = layer.filtered(x.bfloat16())
    assert found.output.dtype == torch.complex64 and found.weights is not None and found.weights.shape == (1, 2, 300, 300)
    assert layer.filtered(x.bfloat16(), diagnostics=False).weights is None


def test_likelihoods_of_the_description() -> None:
    assert description() == description(True) != description(False)
