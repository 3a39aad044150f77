"""Cosine attention: both places of the divisor, both directions, its learned power."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regard


@pytest.mark.parametrize("divide", ["value", "output"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("power", [None, (0.3, 0.9)])
def test_attention(divide: str, causal: bool, power: tuple[float, float] | None) -> None:
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    want = torch.zeros_like(v)
    for h in range(2):
        p = 1 / (1 + math.exp(-0.5)) if power is None else power[h]
        for i in range(7):
            for j in range(i + 1 if causal else 7):
                cosine = float(q[0, h, i] @ k[0, h, j] / (q[0, h, i].norm() * k[0, h, j].norm()))
                n = 7 if not causal else j + 1 if divide == "value" else i + 1
                want[0, h, i] += cosine * v[0, h, j] / n**p
    given = {} if power is None else {"power": torch.tensor(power, dtype=torch.float64)}
    mechanism = regard.get("cottention", **({} if divide == "value" else {"divide": divide}))
    torch.testing.assert_close(regard.attend(q, k, v, mechanism, mask=regard.Causal() if causal else None, **given), want)


def test_the_layer_learns_the_power_as_a_sigmoid() -> None:
    layer, x = regard.nn.Attention(8, 2, regard.get("cottention", init=-1.0)).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    learned = layer.inputs.learned["power"]
    assert torch.equal(learned, torch.full((2,), -1.0, dtype=torch.float64))
    assert torch.equal(regard.nn.Attention(8, 2, "cottention").inputs.learned["power"], torch.full((2,), 0.5))
    nn.init.normal_(learned)
    q, k, v = (w(x).unflatten(-1, (2, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    n = torch.arange(1, 6, dtype=torch.float64)[:, None] ** (1 / (1 + torch.exp(-learned)))[:, None, None]
    want = (q @ k.mT).tril() @ (v / n)
    torch.testing.assert_close(layer(x), layer.out(want.transpose(1, 2).flatten(-2)))
    given = regard.get("cottention", init=-1.0)
    p = torch.full((2,), 1 / (1 + math.e), dtype=torch.float64)
    torch.testing.assert_close(regard.attend(q, k, v, given), regard.attend(q, k, v, given, power=p))


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="value or output"):
        regard.get("cottention", divide="key")
