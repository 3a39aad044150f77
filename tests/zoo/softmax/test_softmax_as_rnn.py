"""Orders of the series in loops, and every stand-in for the denominator by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.zoo.softmax.softmax_as_rnn import ablation, stabilised, taylor_recurrent_attention


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_orders(order: int) -> None:
    q, k = (0.5 * torch.randn(1, 2, 7, 3, dtype=torch.float64) for _ in range(2))
    v, want = torch.randn(1, 2, 7, 4, dtype=torch.float64), torch.zeros(1, 2, 7, 4, dtype=torch.float64)
    for h in range(2):
        for i in range(7):
            x = [float(q[0, h, i] @ k[0, h, j]) / math.sqrt(3) for j in range(i + 1)]
            w = torch.tensor([sum(a**n / math.factorial(n) for n in range(order + 1)) for a in x], dtype=torch.float64)
            want[0, h, i] = w @ v[0, h, : i + 1] / w.sum()
    torch.testing.assert_close(taylor_recurrent_attention(q, k, v, order), want)
    for executor in ("chunk", "step", "parallel", "reference"):
        found = regard.attend(q, k, v, regard.get("softmax-as-rnn", order=order), mask=regard.Causal(), executor=executor)
        torch.testing.assert_close(found, want)


def unit(y: Tensor, kind: str) -> Tensor:
    if kind == "l2":
        return y / y.norm(dim=-1, keepdim=True)
    if kind == "rms":
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("kind", ["softmax", "length", "clamp", "detach", "gate", "l2", "rms", "layer", "length_rms"])
def test_stand_ins_for_the_denominator(kind: str) -> None:
    layer, x = regard.nn.Attention(12, 3, stabilised(kind)).double(), 4 * torch.randn(1, 7, 12, dtype=torch.float64)
    q, k, v = (w(x).unflatten(-1, (3, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    s = q @ k.mT / 2
    assert float(s.detach().max()) > 5  # where logits are clamped
    e = torch.exp(s if kind in ("softmax", "detach") else s.clamp_max(5.0)).tril()
    total, n = e.sum(-1, keepdim=True), torch.arange(1, 8, dtype=torch.float64)[:, None]
    divisor = {"softmax": total, "detach": total, "length": n, "length_rms": n, "clamp": total.clamp_min(1.0)}.get(kind, torch.ones(()))
    o = e @ v / divisor
    if kind in ("l2", "rms", "layer", "length_rms"):
        o = unit(o, kind.removeprefix("length_"))
    if kind == "gate":
        gate = layer.head_gate
        assert gate is not None
        o = o / (1 + torch.exp(-(x @ gate.weight.T + gate.bias))).transpose(1, 2)[..., None]  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x), layer.out(o.transpose(1, 2).flatten(-2)))


def test_small_sums_are_divided_by_one() -> None:
    q, k, v = (
        torch.full((1, 1, 3, 4), 2.0, dtype=torch.float64),
        torch.full((1, 1, 3, 4), -1.0, dtype=torch.float64),
        torch.randn(1, 1, 3, 4, dtype=torch.float64),
    )
    torch.testing.assert_close(regard.attend(q, k, v, stabilised("clamp"))[0, 0], math.exp(-4) * v[0, 0].sum(0).expand(3, -1))


def test_the_ablation() -> None:
    found = ablation(("softmax", "l2", "order 1"), steps=3)
    assert list(found) == ["softmax", "l2", "order 1"] and all(math.isfinite(x) and x > 0 for x in found.values())
    assert (
        found
        == ablation(("softmax", "l2", "order 1"), steps=3, length=32, dim=32, seed=0)
        != ablation(("softmax", "l2", "order 1"), steps=3, seed=1)
    )
    kinds = ablation(steps=1, length=8, dim=8)
    assert list(kinds) == ["softmax", "length", "clamp", "detach", "gate", "l2", "rms", "layer", "length_rms", "order 1", "order 2"]
    with pytest.raises(regard.RegardError, match="order 1"):
        ablation(("order x",), steps=1)


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="0 or more"):
        regard.get("softmax-as-rnn", order=-1)
    with pytest.raises(regard.RegardError, match="length_rms"):
        stabilised("norm")
    assert regard.get("softmax-as-rnn") == regard.get("softmax-as-rnn", order=2)
