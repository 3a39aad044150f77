"""Pointwise attention: every function, other powers of the length, the layer's norm of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import regard

PHI: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "softplus": lambda x: math.log1p(math.exp(x)),
    "identity": lambda x: x,
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(phi: str, alpha: float, causal: bool) -> None:
    q, k, v = (3 * torch.randn(1, 1, 8, 4, dtype=torch.float64) for _ in range(3))
    want = torch.zeros_like(v)
    for i in range(8):
        n = i + 1 if causal else 8
        for j in range(n):
            want[0, 0, i] += n**-alpha * PHI[phi](float(q[0, 0, i] @ k[0, 0, j]) / 2) * v[0, 0, j]
    given = {} if phi == "relu" else {"phi": phi}
    mechanism = regard.get("relu", **(given if alpha == 1 else given | {"alpha": alpha}))
    torch.testing.assert_close(regard.attend(q, k, v, mechanism, mask=regard.Causal() if causal else None), want)


def test_padded_keys_do_not_count() -> None:
    q, k, v = (torch.randn(1, 1, 8, 4, dtype=torch.float64) for _ in range(3))
    keep = torch.tensor([[True, False, True, True, False, False, True, True]])
    found = regard.attend(q, k, v, "relu", mask=regard.Padding(), keep=keep)
    s = (q @ k.mT / 2).relu()[..., keep[0]]
    torch.testing.assert_close(found, s @ v[:, :, keep[0]] / 5)


def test_the_layer_normalises_queries_and_keys() -> None:
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    for kind in ("", "layer"):
        layer = regard.nn.Attention(12, 3, regard.get("relu", qk_norm=kind), causal=False).double()
        q, k, v = (w(x).unflatten(-1, (3, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
        if kind:
            q, k = ((y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() for y in (q, k))
        want = (q @ k.mT / 2).relu() @ v / 7
        torch.testing.assert_close(layer(x), layer.out(want.transpose(1, 2).flatten(-2)))
    assert regard.get("relu") == regard.get("relu", qk_norm="")


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="relu2, gelu"):
        regard.get("relu", phi="tanh")
