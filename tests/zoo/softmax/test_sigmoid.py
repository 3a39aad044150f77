"""Sigmoid attention's biases, and the paper's stabilisers in the layer."""

from __future__ import annotations

import math

import pytest
import torch

import regard


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [None, -1.5, "heads"])
def test_biases(causal: bool, bias: float | str | None) -> None:
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(3))
    own = torch.tensor([-0.5, 2.0], dtype=torch.float64)
    want = torch.zeros_like(v)
    for h in range(2):
        for i in range(8):
            n = i + 1 if causal else 8
            b = -math.log(n) if bias is None else bias if isinstance(bias, float) else float(own[h])
            for j in range(n):
                want[0, h, i] += v[0, h, j] / (1 + math.exp(-float(q[0, h, i] @ k[0, h, j]) / 2 - b))
    mechanism = regard.get("sigmoid", bias=bias) if isinstance(bias, float) else regard.get("sigmoid")
    given = {"bias": own} if bias == "heads" else {}
    torch.testing.assert_close(regard.attend(q, k, v, mechanism, mask=regard.Causal() if causal else None, **given), want)


@pytest.mark.parametrize(("qk_norm", "out_norm"), [("", ""), ("layer", ""), ("", "rms"), ("rms", "layer")])
def test_the_layer(qk_norm: str, out_norm: str) -> None:
    layer = regard.nn.Attention(12, 3, regard.get("sigmoid", qk_norm=qk_norm, out_norm=out_norm)).double()
    x = torch.randn(1, 7, 12, dtype=torch.float64)

    def norm(y: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "layer":
            return (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() if kind else y

    q, k, v = (w(x).unflatten(-1, (3, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    s = norm(q, qk_norm) @ norm(k, qk_norm).mT / 2 - torch.arange(1, 8, dtype=torch.float64).log()[:, None]
    want = norm(torch.sigmoid(s).tril() @ v, out_norm)
    torch.testing.assert_close(layer(x), layer.out(want.transpose(1, 2).flatten(-2)))


def test_positions_windows_and_defaults() -> None:
    assert regard.get("sigmoid") == regard.get("sigmoid", bias=None, position=None, qk_norm="", out_norm="")
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    at = torch.arange(9)
    apart = (at[:, None] - at).double()
    seen = (apart >= 0) & (apart < 4)
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64)
    s = q @ k.mT / 2 - slopes[:, None, None] * apart - seen.sum(-1, keepdim=True).log()
    found = regard.attend(q, k, v, regard.get("sigmoid", position=regard.algebra.Alibi()), mask=regard.Causal() & regard.Window(4))
    torch.testing.assert_close(found, (torch.sigmoid(s) * seen) @ v)
