"""Clipped softmax's numbers and the gates of heads, by hand from a layer's parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.nn.parts import HeadGate


def row(s: Tensor, gamma: float, zeta: float) -> Tensor:
    p = torch.exp(s) / torch.exp(s).sum()
    return torch.tensor([min(max((zeta - gamma) * float(x) + gamma, 0.0), 1.0) for x in p], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "gamma", "zeta"),
    [
        ({}, -4 / 9, 1.0),
        ({"alpha": 1.0}, -1 / 9, 1.0),
        ({"gamma": -0.03}, -0.03, 1.0),
        ({"gamma": 0.0, "zeta": 1.2}, 0.0, 1.2),
        ({"zeta": 3.0}, -4 / 9, 3.0),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_weights(options: dict[str, float], gamma: float, zeta: float, causal: bool) -> None:
    q, k, v = (2 * torch.randn(1, 1, 9, 4, dtype=torch.float64) for _ in range(3))
    s = (q @ k.mT / 2)[0, 0]
    want = torch.stack([row(s[i, : i + 1 if causal else 9], gamma, zeta) @ v[0, 0, : i + 1 if causal else 9] for i in range(9)])
    found = regard.attend(q, k, v, regard.get("clipped-softmax", **options), mask=regard.Causal() if causal else None)
    torch.testing.assert_close(found[0, 0], want)


def test_a_gamma_given_and_a_layer_s_length() -> None:
    q, k, v = (2 * torch.randn(1, 1, 9, 4, dtype=torch.float64) for _ in range(3))
    s = (q @ k.mT / 2)[0, 0]
    want = torch.stack([row(one, -0.1, 1.0) @ v[0, 0] for one in s])
    torch.testing.assert_close(regard.attend(q, k, v, "clipped-softmax", gamma=torch.tensor(-0.1, dtype=torch.float64))[0, 0], want)
    layer = regard.nn.Attention(4, 1, "clipped-softmax", causal=False, context_len=50).double()
    assert not list(layer.inputs.parameters())
    x = 3 * torch.randn(1, 9, 4, dtype=torch.float64)
    q, k, v = (w(x)[0] for w in (layer.q, layer.k, layer.v))
    want = torch.stack([row(one, -4 / 50, 1.0) @ v for one in q @ k.T / 2])
    torch.testing.assert_close(layer(x)[0], layer.out(want))


@torch.no_grad()
def gate_by_hand(gate: HeadGate, x: Tensor, factor: float) -> Tensor:
    """(H, n) factors of one sample."""
    n, heads = len(x), gate.heads
    logits = torch.zeros(heads, n, dtype=torch.float64)
    for h in range(heads):
        for t in range(n):
            own = x[t] if gate.kind == "heads" else x[t].view(heads, -1)[h]
            if gate.hidden is not None and gate.hidden_bias is not None:
                own = (own @ gate.hidden[h] + gate.hidden_bias[h]).clamp_min(0)
            logits[h, t] = gate.bias[h] + (0.0 if gate.weight is None else gate.weight[h] @ own)
    logits = logits.mean(1, keepdim=True).expand(-1, n) if gate.kind == "mean" else logits
    return factor / (1 + torch.exp(-logits))


@pytest.mark.parametrize("kind", ["head", "head_mlp", "heads", "mean", "constant"])
@torch.no_grad()
def test_gated_layers(kind: str) -> None:
    options = {"gate_init": 0.2, "gate_factor": 5.0} | ({"gate_hidden": 3} if kind == "head_mlp" else {})
    layer = regard.nn.Attention(12, 3, regard.get("clipped-softmax", gamma=0.0, out_gate=kind, **options), causal=False).double()
    gate, x = layer.head_gate, torch.randn(1, 6, 12, dtype=torch.float64)
    assert gate is not None and gate.kind == kind
    torch.testing.assert_close(gate.bias, torch.full((3,), math.log(0.25), dtype=torch.float64), atol=1e-6, rtol=0)
    assert gate.hidden is None or (gate.hidden.shape == (3, 4, 3) and bool((gate.hidden_bias == 0).all()))  # type: ignore[operator]
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    q, k, v = (w(x).unflatten(-1, (3, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    o = nn.functional.scaled_dot_product_attention(q, k, v)[0] * gate_by_hand(gate, x[0], 5.0)[..., None]
    torch.testing.assert_close(layer(x)[0], layer.out(o.transpose(0, 1).flatten(1)))


def test_gates_start_at_a_half_unless_told() -> None:
    layer = regard.nn.Attention(16, 2, regard.get("clipped-softmax", out_gate="head_mlp"))
    gate = layer.head_gate
    assert gate is not None and gate.hidden is not None and gate.hidden.shape == (2, 8, 2) and gate.factor == 1.0
    assert bool((gate.bias == 0).all()) and regard.nn.Attention(16, 2, "clipped-softmax").head_gate is None
    wide = HeadGate(4096, 2, "heads", std=0.001, init=0.5)
    assert wide.weight is not None and float(wide.weight.detach().std()) == pytest.approx(0.001, rel=0.05)
    assert float(HeadGate(8192, 2, "head", 0.5).weight.detach().std()) == pytest.approx(1 / 64, rel=0.05)  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"gamma": 0.1}, {"zeta": 0.9}, {"alpha": -1.0}])
def test_says_what_is_wrong(wrong: dict[str, float]) -> None:
    with pytest.raises(regard.RegardError, match="gamma <= 0, zeta >= 1, alpha >= 0"):
        regard.get("clipped-softmax", **wrong)
    for fine in ({"gamma": 0.0}, {"zeta": 1.0}, {"alpha": 0.0}):
        regard.get("clipped-softmax", **fine)
