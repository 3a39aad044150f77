"""Selective self-attention's layer by hand: what the temperatures are read off, through which functions, from which start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regard
from regard.zoo.softmax.selective_self_attention import vanishing


@pytest.mark.parametrize("squash", ["sigmoid", "vanishing"])
@pytest.mark.parametrize("tokens", [True, False])
@torch.no_grad()
def test_the_layer(squash: str, tokens: bool) -> None:
    layer = regard.nn.Attention(12, 4, regard.get("selective-self-attention", tokens=tokens, squash=squash), kv_heads=2).double()
    assert set(layer.inputs.learned) == {"tau_rate", *(("tau_query", "tau_value") if tokens else ())}
    for parameter in layer.inputs.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    q, k, v = (w(x).view(7, -1, 3) for w in (layer.q, layer.k, layer.v))
    learned, o = layer.inputs.learned, torch.zeros(7, 4, 3, dtype=torch.float64)

    def read(y: torch.Tensor, w: torch.Tensor) -> float:
        return math.tanh(sum(float(a) * float(b) * (1 + math.erf(float(b) / math.sqrt(2))) / 2 for a, b in zip(w, y, strict=True)))

    for h in range(4):
        a = float(learned["tau_rate"][h])
        rate = 1 / (1 + math.exp(-a)) if squash == "sigmoid" else math.exp(-math.exp(a))
        for i in range(7):
            tau = (read(q[i, h], learned["tau_query"][h]) if tokens else 0.0) + 1 + rate * math.log(i + 1)
            p = (tau * (k[: i + 1, h // 2] @ q[i, h]) / math.sqrt(3)).softmax(0)
            for j in range(i + 1):
                o[i, h] += p[j] * v[j, h // 2] * (1 + read(v[j, h // 2], learned["tau_value"][h // 2]) if tokens else 1.0)
    torch.testing.assert_close(layer(x)[0], layer.out(o.flatten(1)))


def test_starts() -> None:
    for squash, start in (("sigmoid", 0.0), ("vanishing", 2.0)):
        learned = regard.nn.Attention(12, 4, regard.get("selective-self-attention", squash=squash)).inputs.learned
        assert torch.equal(learned["tau_rate"], torch.full((4,), start))
        assert bool((learned["tau_query"] == 0).all() and (learned["tau_value"] == 0).all())
    learned = regard.nn.Attention(12, 4, regard.get("selective-self-attention", init=1.5)).inputs.learned
    assert torch.equal(learned["tau_rate"], torch.full((4,), 1.5))
    assert float(vanishing(torch.tensor(2.0))) == pytest.approx(6.2e-4, rel=0.01)


def test_a_converted_layer_is_where_it_was() -> None:
    """The released start of fine-tuning: positions alone, 1 + 6e-4 log n."""
    plain, x = regard.nn.Attention(12, 4).double(), torch.randn(2, 9, 12, dtype=torch.float64)
    layer = regard.nn.Attention(12, 4, regard.get("selective-self-attention", squash="vanishing")).double()
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert float((layer(x) - plain(x)).detach().abs().max()) < 1e-3


def test_without_inputs_attention_is_plain_and_a_temperature_of_zero_removes_a_value() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(regard.attend(q, k, v, "selective-self-attention"), regard.attend(q, k, v, "softmax"))
    tau = torch.ones(1, 2, 9, dtype=torch.float64)
    tau[..., 3] = 0
    other = v.clone()
    other[:, :, 3] = 100.0
    found = [regard.attend(q, k, x, "selective-self-attention", tau_value=tau) for x in (v, other)]
    torch.testing.assert_close(*found)


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="sigmoid or vanishing"):
        regard.get("selective-self-attention", squash="tanh")
