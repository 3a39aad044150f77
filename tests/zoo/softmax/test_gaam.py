"""Gaussian adaptive attention in loops over entries: chunks, axes, padding, running statistics, blocks."""

from __future__ import annotations

import math

import pytest
import torch

from regard import RegardError
from regard.zoo.softmax.gaam import GaussianAdaptiveAttention, GaussianBlock, importance_factor


def chunk(values: list[float], deltas: list[float], widths: list[float], eps: float, running: bool) -> list[float]:
    """Weights of one head's entries."""
    products = []
    for i, x in enumerate(values):
        known = values[: i + 1] if running else values
        mean = sum(known) / len(known)
        variance = sum((y - mean) ** 2 for y in known) / max(1, len(known) - 1) + eps
        w = 1.0
        for delta, c in zip(deltas, widths, strict=True):
            c = max(abs(c), 1e-3)
            z = (x - mean - delta) / math.sqrt(variance)
            w *= math.exp(-z * z / (2 * c * c)) / math.sqrt(2 * math.pi * c * c)
        products.append(w)
    totals = [sum(products[: i + 1]) if running else sum(products) for i in range(len(values))]
    return [w / max(total, eps) for w, total in zip(products, totals, strict=True)]


def loops(layer: GaussianAdaptiveAttention, x: list[float]) -> list[float]:
    size, out = len(x) // layer.heads, []
    for h in range(layer.heads):
        part = x[h * size : (h + 1) * size if h < layer.heads - 1 else len(x)]
        out += chunk(part, layer.delta[h].tolist(), layer.c[h].tolist(), layer.eps, layer.running)
    return out


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_weights(running: bool, eps: float) -> None:
    layer = GaussianAdaptiveAttention(-1, 3, 2, eps=eps, running=running).double()
    torch.nn.init.normal_(layer.delta, std=0.3)
    with torch.no_grad():
        layer.c[1, 0], layer.c[0, 1] = -0.7, 1e-5 if eps == 0.5 else 0.0015
    x = torch.randn(4, 11, dtype=torch.float64)
    y, w = layer(x, return_weights=True)
    want = torch.tensor([loops(layer, row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(w, want)
    torch.testing.assert_close(y, x * want)


def test_running_weights_are_causal() -> None:
    layer = GaussianAdaptiveAttention(1, 1, 2, running=True).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    other = x.clone()
    other[:, 6:] += 1
    torch.testing.assert_close(layer(other)[:, :6], layer(x)[:, :6])


def test_axis_of_time_and_defaults() -> None:
    layer = GaussianAdaptiveAttention(1).double()
    assert layer.delta.shape == layer.c.shape == (4, 3) and not layer.running and layer.padding_value is None and layer.eps == 1e-8
    assert bool((layer.delta == 0).all()) and bool((layer.c > 0).all())
    torch.manual_seed(0)
    drawn = GaussianAdaptiveAttention(-1, 100, 100).c.log()
    assert abs(float(drawn.detach().mean())) < 0.05 and abs(float(drawn.detach().std()) - 1) < 0.05
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    feature = GaussianAdaptiveAttention().double()
    feature.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), feature(x.transpose(1, 2)).transpose(1, 2))
    assert layer(x, return_weights=True)[1].shape == x.shape


def test_padding_counts_as_zero_in_the_statistics_and_passes_unchanged() -> None:
    layer = GaussianAdaptiveAttention(-1, 1, 1, padding_value=-9.0).double()
    torch.nn.init.constant_(layer.delta, 0.2)
    x = torch.tensor([0.5, -9.0, 1.5, -0.25], dtype=torch.float64)
    y, w = layer(x, return_weights=True)
    known, c = [0.5, 0.0, 1.5, -0.25], float(layer.c)
    mean = sum(known) / 4
    sigma = math.sqrt(sum((v - mean) ** 2 for v in known) / 3 + 1e-8)
    raw = [math.exp(-(((v - mean - 0.2) / sigma) ** 2) / (2 * c * c)) for v in x.tolist()]
    torch.testing.assert_close(w, torch.tensor(raw, dtype=torch.float64) / sum(raw))
    torch.testing.assert_close(y, torch.where(x == -9.0, x, x * w))
    torch.testing.assert_close(GaussianBlock(-1, 1, 1, padding_value=-9.0).double()(x)[1], x[1] * 2)


def test_a_block_adds_each_attention() -> None:
    block, x = GaussianBlock(1, 2, 2, layers=3).double(), torch.randn(2, 8, 3, dtype=torch.float64)
    want = x
    for layer in block.layers:
        want = want + layer(want)
    torch.testing.assert_close(block(x), want)
    assert len(list(block.parameters())) == 6
    assert len(block.layers) == 3 and len(GaussianBlock().layers) == 1 and GaussianBlock().layers[0].delta.shape == (4, 3)
    assert GaussianBlock(1).layers[0].axis == 1 and GaussianBlock().layers[0].axis == -1


def test_importance_factor() -> None:
    w = torch.tensor([[[1.0, 3.0, 2.0]], [[3.0, 9.0, 2.0]]])
    torch.testing.assert_close(importance_factor(w), torch.tensor([0.0, 1.0, 0.0]))
    assert bool((importance_factor(torch.ones(4, 3)) == 0).all())


def test_says_what_is_wrong() -> None:
    with pytest.raises(RegardError, match="positive integers"):
        GaussianAdaptiveAttention(-1, 0)
    with pytest.raises(RegardError, match="positive integers"):
        GaussianAdaptiveAttention(-1, 1, 0)
    with pytest.raises(RegardError, match="at least heads=4"):
        GaussianAdaptiveAttention()(torch.randn(2, 3))
    assert GaussianAdaptiveAttention(-1, 1, 1)(torch.randn(2, 1)).shape == (2, 1)
