"""ReLU attention's regularisers and memories in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.zoo.softmax.reluformer import KeyValueMemory, entropy_margin_loss, row_mass_loss


def entropy(p: list[float]) -> float:
    total = sum(p)
    return -sum(x / total * math.log(x / total) for x in p if x > 0) if total else 0.0


def drawn() -> Tensor:
    w = torch.rand(2, 3, 5, 7, dtype=torch.float64) * (torch.rand(2, 3, 5, 7) > 0.4)
    w[0, 1, 2] = 0.0  # a row without weight
    return w


def test_mass_of_rows() -> None:
    w = drawn()
    masses = [float(row.sum()) for row in w.flatten(0, 2)]
    live = [abs(math.log(mass)) for mass in masses if mass > 1e-8]
    assert len(live) < len(masses)
    assert float(row_mass_loss(w)) == pytest.approx(sum(live) / len(live), rel=1e-12)
    some = [abs(math.log(mass)) for mass in masses if mass > 1.5]
    assert float(row_mass_loss(w, eps=1.5)) == pytest.approx(sum(some) / len(some), rel=1e-12)
    assert float(row_mass_loss(torch.zeros(2, 3))) == 0.0
    one = torch.tensor([[0.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    assert float(row_mass_loss(one)) == pytest.approx(math.log(1.5))
    faint = torch.tensor([[1.5e-8, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert float(row_mass_loss(faint)) == pytest.approx(-math.log(1.5e-8) / 2)
    leaf = w.clone().requires_grad_()
    row_mass_loss(leaf).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("margin", [0.7, 0.3])
def test_entropy_above_a_margin(margin: float) -> None:
    w = drawn()
    rows = [row.tolist() for row in w.flatten(0, 2)]
    want = sum(max(0.0, entropy(row) - margin * math.log(7)) for row in rows) / len(rows)
    given = {} if margin == 0.7 else {"margin": margin}
    assert float(entropy_margin_loss(w, **given)) == pytest.approx(want, rel=1e-9) and want > 0
    seen = torch.ones(5, 7, dtype=torch.bool).tril(2)
    masked = w * seen
    rows = [(row.tolist(), 3 + i) for one in masked.flatten(0, 1) for i, row in enumerate(one)]
    want = sum(max(0.0, entropy(row) - margin * math.log(n)) for row, n in rows) / len(rows)
    assert float(entropy_margin_loss(masked, margin, seen)) == pytest.approx(want, rel=1e-9)
    faint = torch.full((1, 4), 1.5e-8 / 4, dtype=torch.float64)
    assert float(entropy_margin_loss(faint)) == pytest.approx(0.3 * math.log(4))
    leaf = w.clone().requires_grad_()
    entropy_margin_loss(leaf).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("activation", ["relu", "softmax", "softmax_norm"])
def test_memories(activation: str) -> None:
    memory, x = KeyValueMemory(6, 10, activation).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    for parameter in (memory.key_bias, memory.value_bias):
        nn.init.normal_(parameter)
    z = x @ memory.keys.T + memory.key_bias
    if activation == "relu":
        w = z.clamp_min(0)
    else:
        w = torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)
    y = w @ memory.values
    if activation == "softmax_norm":
        away = y - y.mean(-1, keepdim=True)
        y = away / (away.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(memory(x), y + memory.value_bias)


def test_a_memory_starts_at_unit_scale_without_biases() -> None:
    memory = KeyValueMemory(64, 256)
    assert memory.activation == "relu" and bool((memory.key_bias == 0).all() and (memory.value_bias == 0).all())
    assert float(memory.keys.detach().std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(memory.values.detach().std()) == pytest.approx(1 / 16, rel=0.05)


def test_layers_of_relu_attention_learn_the_factor_as_an_exponential() -> None:
    layer, x = regard.nn.Attention(12, 3, "reluformer").double(), torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v, _ = layer.heads_of(x, x, 0, None)
    seen = torch.arange(1, 8, dtype=torch.float64)[:, None]
    for g in (0.0, 0.4):
        nn.init.constant_(layer.inputs.learned["gamma"], g)
        w = (q @ k.mT / 2).relu().tril() / (math.exp(g) * (seen / 2).sqrt())
        torch.testing.assert_close(layer(x), layer.out((w @ v).transpose(1, 2).flatten(-2)))
    assert layer.inputs.learned["gamma"].shape == (3,)


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="softmax_norm"):
        KeyValueMemory(4, 4, "gelu")
