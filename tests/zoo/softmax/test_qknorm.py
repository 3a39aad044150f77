"""Cosine scores with a learned scale: its start, its eps, its layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regard
from regard.zoo.softmax.qknorm import g0_from_lengths


@pytest.mark.parametrize("init", [None, 3.0])
def test_the_layer(init: float | None) -> None:
    layer, x = (
        regard.nn.Attention(8, 2, regard.get("qknorm", init=init), context_len=20).double(),
        torch.randn(1, 5, 8, dtype=torch.float64),
    )
    g = layer.inputs.learned["temperature"]
    torch.testing.assert_close(g, torch.full((2,), init or math.log2(20 * 20 - 20), dtype=torch.float64), atol=1e-5, rtol=0)
    nn.init.uniform_(g, 1.0, 5.0)
    q, k, v = (w(x).unflatten(-1, (2, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    s = g[:, None, None] * (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).mT
    want = s.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.out(want.transpose(1, 2).flatten(-2)))


def test_short_vectors_are_divided_by_eps() -> None:
    q, k = 1e-8 * torch.randn(1, 1, 3, 4, dtype=torch.float64), torch.randn(1, 1, 5, 4, dtype=torch.float64)
    v = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    for eps in (1e-6, 1e-7):
        given = {} if eps == 1e-6 else {"eps": eps}
        s = 7 * (q / eps) @ (k / k.norm(dim=-1, keepdim=True)).mT
        found = regard.attend(q, k, v, regard.get("qknorm", init=7.0, **given))
        torch.testing.assert_close(found, s.softmax(-1) @ v, atol=1e-9, rtol=0)


def test_the_start_from_lengths() -> None:
    assert g0_from_lengths([2, 2]) == 1.0 and g0_from_lengths((10, 20, 30)) == pytest.approx(math.log2(29.5**2 - 29.5))
    for wrong, words in (([], "empty"), ([1, 1], "at least 2")):
        with pytest.raises(regard.RegardError, match=words):
            g0_from_lengths(wrong)
