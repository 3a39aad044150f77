"""Scalable-Softmax: scales and biases a head, its layer, a scale for conversion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regard
from regard.zoo.softmax.ssmax import calibrated_scale


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"init": 0.9, "bias": 0.3}])
def test_attention(causal: bool, options: dict[str, float]) -> None:
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    s, b = options.get("init", 0.43), options.get("bias", 0.0)
    given = {"ssmax_scale": torch.tensor([0.2, 1.3], dtype=torch.float64), "ssmax_bias": torch.tensor([-0.4, 0.6], dtype=torch.float64)}
    for inputs in ({}, given):
        want = torch.zeros_like(v)
        for h in range(2):
            scale, bias = (float(given["ssmax_scale"][h]), float(given["ssmax_bias"][h])) if inputs else (s, b)
            for i in range(7):
                n = i + 1 if causal else 7
                z = (k[0, h, :n] @ q[0, h, i]) / 2
                want[0, h, i] = ((scale * math.log(n) + bias) * z).softmax(0) @ v[0, h, :n]
        found = regard.attend(q, k, v, regard.get("ssmax", **options), mask=regard.Causal() if causal else None, **inputs)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("learn_bias", [False, True])
def test_the_layer(learn_bias: bool) -> None:
    layer = regard.nn.Attention(8, 2, regard.get("ssmax", bias=0.1, learn_bias=learn_bias)).double()
    learned = layer.inputs.learned
    assert set(learned) == ({"ssmax_scale", "ssmax_bias"} if learn_bias else {"ssmax_scale"})
    torch.testing.assert_close(learned["ssmax_scale"], torch.full((2,), 0.43, dtype=torch.float64), atol=1e-6, rtol=0)
    assert regard.get("ssmax") == regard.get("ssmax", init=0.43, bias=0.0, learn_bias=False)
    nn.init.normal_(learned["ssmax_scale"])
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = (w(x).unflatten(-1, (2, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    n = torch.arange(1, 6, dtype=torch.float64).log()[:, None]
    s = (learned["ssmax_scale"][:, None, None] * n + 0.1) * (q @ k.mT / 2)
    want = s.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.out(want.transpose(1, 2).flatten(-2)))


def test_a_scale_for_conversion() -> None:
    logs = [math.log(i) for length in (3, 8) for i in range(1, length + 1)]
    assert calibrated_scale([3, 8]) == pytest.approx(len(logs) / sum(logs), rel=1e-12)  # in double precision
