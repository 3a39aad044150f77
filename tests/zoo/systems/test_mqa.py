"""Shared key and value heads: layers by hand, conversion, the model of traffic."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.zoo.systems.mqa import decode_traffic, pool_heads


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_the_layer_and_its_cache(kv_heads: int) -> None:
    mechanism = regard.get("mqa", **({} if kv_heads == 1 else {"kv_heads": kv_heads}))
    layer, x = regard.nn.Attention(12, 4, mechanism).double(), torch.randn(1, 5, 12, dtype=torch.float64)
    assert layer.kv_heads == kv_heads and layer.k.weight.shape == layer.v.weight.shape == (3 * kv_heads, 12)
    q, k, v = layer.q(x)[0].view(5, 4, 3), layer.k(x)[0].view(5, kv_heads, 3), layer.v(x)[0].view(5, kv_heads, 3)
    o = torch.zeros(5, 4, 3, dtype=torch.float64)
    for h in range(4):
        g = h * kv_heads // 4
        for i in range(5):
            o[i, h] = (k[: i + 1, g] @ q[i, h] / math.sqrt(3)).softmax(0) @ v[: i + 1, g]
    torch.testing.assert_close(layer(x)[0], layer.out(o.flatten(1)))
    _, state = layer.step(x)
    assert state.inner is not None and state.inner.k.shape == (1, kv_heads, 5, 3)  # type: ignore[attr-defined]


def test_models_of_one_shared_head_train() -> None:
    model = regard.nn.Decoder("mqa", vocab=9, dim=8, layers=2, heads=4)
    model(torch.randint(9, (2, 5))).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_conversion() -> None:
    w = torch.randn(12, 5, dtype=torch.float64)
    for kv_heads in (1, 2, 4):
        want = torch.zeros(3 * kv_heads, 5, dtype=torch.float64)
        for h in range(4):
            g = h * kv_heads // 4
            want[3 * g : 3 * g + 3] += w[3 * h : 3 * h + 3] * kv_heads / 4
        torch.testing.assert_close(pool_heads(w, 4, kv_heads), want)
    for heads, kv_heads in ((4, 3), (5, 1)):
        with pytest.raises(regard.RegardError, match="multiple of kv_heads"):
            pool_heads(w, heads, kv_heads)


def test_traffic() -> None:
    """1 / d + n g / (d h) + 1 / b: with one head the term of the context is 1 / h of multi-head's."""
    assert decode_traffic(1024, 8, 1, 2048, 128) == pytest.approx(1 / 1024 + 2048 / (1024 * 8) + 1 / 128)
    full, shared = (decode_traffic(64, 8, g, 10**9, 10**9) for g in (8, 1))
    assert full / shared == pytest.approx(8, rel=1e-3)
