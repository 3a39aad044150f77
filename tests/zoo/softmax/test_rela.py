"""Rectified linear attention's two norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regard


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer(gated: bool, causal: bool) -> None:
    layer = regard.nn.Attention(12, 3, regard.get("rela", gated=gated), causal=causal).double()
    parameters = dict(layer.merge_norm.named_parameters())
    assert set(parameters) == ({"scale", "gate"} if gated else {"weight"})
    for parameter in parameters.values():
        assert torch.equal(parameter, torch.ones_like(parameter)) and parameter.shape == (12,)
        nn.init.normal_(parameter)
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    q, k, v = (w(x).unflatten(-1, (3, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    s = (q @ k.mT / 2).clamp_min(0)
    o = ((s.tril() if causal else s) @ v).transpose(1, 2).flatten(-2)
    unit = o / (o.square().mean(-1, keepdim=True) + (1e-8 if gated else 1e-6)).sqrt()
    if gated:
        want = parameters["scale"] * unit / (1 + torch.exp(-parameters["gate"] * o))
    else:
        want = parameters["weight"] * unit
    torch.testing.assert_close(layer(x), layer.out(want))
    assert regard.get("rela") == regard.get("rela", gated=True)
