"""Normalized attention: its layer with both comparisons by hand, pooled values, the spread of tokens at the start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.zoo.softmax.nap import PooledValues, token_spread


def layer_norm(x: Tensor, eps: float) -> Tensor:
    away = x - x.mean(-1, keepdim=True)
    return away / (away.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu(x: Tensor, kind: str) -> Tensor:
    if kind == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("options", "eps", "norm_eps", "kind"),
    [
        ({}, 1e-3, 1e-3, "gelu_tanh"),
        ({"eps": 0.5, "norm_eps": 0.2, "activation": "gelu"}, 0.5, 0.2, "gelu"),
        ({"variant": "mte"}, None, 1e-3, "gelu_tanh"),
        ({"variant": "non"}, None, None, "gelu_tanh"),
        ({"variant": "non", "length": 30, "activation": "gelu"}, None, None, "gelu"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_the_layer(options: dict[str, object], eps: float | None, norm_eps: float | None, kind: str, causal: bool) -> None:
    layer = regard.nn.Attention(12, 3, regard.get("nap", **options), causal=causal).double()
    for parameter in layer.inputs.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    q, k, v = (w(x).view(7, 3, 4).transpose(0, 1) for w in (layer.q, layer.k, layer.v))
    o = torch.zeros(3, 7, 4, dtype=torch.float64)
    for h in range(3):
        for i in range(7):
            n = i + 1 if causal else 7
            s = k[h, :n] @ q[h, i]
            if eps is not None:
                mean = s.sum() / n
                std = ((s - mean) ** 2).mean().sqrt()
                w = layer.inputs.learned["gain"][h] * (s - mean) / (std + eps) + layer.inputs.learned["shift"][h]
            elif options["variant"] == "mte":
                w = (s / 2).softmax(0)
            else:
                w = s / 2 / math.sqrt(int(options.get("length", n)))  # type: ignore[call-overload]
            o[h, i] = w @ v[h, :n]
    merged = o.transpose(0, 1).reshape(7, 12)
    merged = merged if norm_eps is None else layer_norm(merged, norm_eps)
    torch.testing.assert_close(layer(x)[0], layer.out(gelu(merged, kind)))


def test_gain_and_shift_start_at_one_and_zero() -> None:
    learned = regard.nn.Attention(12, 3, "nap").inputs.learned
    assert torch.equal(learned["gain"], torch.ones(3)) and torch.equal(learned["shift"], torch.zeros(3))
    q, k, v = (torch.randn(1, 3, 7, 4, dtype=torch.float64) for _ in range(3))
    given = {"gain": torch.ones(3, dtype=torch.float64), "shift": torch.zeros(3, dtype=torch.float64)}
    torch.testing.assert_close(regard.attend(q, k, v, "nap"), regard.attend(q, k, v, "nap", **given))


def test_equal_logits_have_no_infinite_slope() -> None:
    q = torch.zeros(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 5, 4, dtype=torch.float64) for _ in range(2))
    for eps in (1e-3, 0.5):
        out = regard.attend(q, k, v, regard.get("nap", eps=eps), shift=torch.tensor(0.3, dtype=torch.float64))
        torch.testing.assert_close(out, 0.3 * v.sum(-2, keepdim=True).expand_as(out))
        assert bool(torch.autograd.grad(out.sum(), q)[0].isfinite().all())


@pytest.mark.parametrize("kind", ["max", "sum"])
@pytest.mark.parametrize("merged", [True, False])
@torch.no_grad()
def test_pooled_values(kind: str, merged: bool) -> None:
    layer, x = PooledValues(6, kind, merged, norm_eps=0.1).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    keep = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    for kept in (keep, None):
        found = layer(x, kept)
        for b in range(3):
            v = [layer.v(token) for token, here in zip(x[b], keep[b] if kept is not None else [True] * 5, strict=True) if here]
            pooled = torch.zeros(6, dtype=torch.float64) if not v else torch.stack(v).amax(0) if kind == "max" else torch.stack(v).sum(0)
            pooled = gelu(layer_norm(pooled, 0.1), "gelu_tanh") if merged else pooled
            torch.testing.assert_close(found[b], layer.out(pooled).expand(5, 6))


def test_pooled_values_by_default() -> None:
    torch.manual_seed(1)
    layer = PooledValues(6)
    assert layer.kind == "max" and isinstance(layer.norm, nn.Sequential) and layer.norm[0].eps == 1e-3 and layer.v.bias is not None
    layer(torch.randn(2, 4, 6)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_tokens_draw_together_under_softmax_alone() -> None:
    soft = token_spread("softmax", (16, 1024))
    assert soft[0] / soft[1] == pytest.approx(8.0, rel=0.3)  # sqrt(1024 / 16)
    assert soft[0] == pytest.approx(0.1 / 4, rel=0.3)  # weights differ from 1 / n by 0.1 / n
    kept = token_spread("nap")
    assert len(kept) == 4 and max(kept) / min(kept) < 1.2 and min(kept) > 0.9
    assert token_spread("non", (64,)) == pytest.approx([0.1], rel=0.3)
    assert token_spread("mte", (64,), std=0.2)[0] > 1.5 * token_spread("mte", (64,))[0]
    assert token_spread("nap", (16,), seed=1) != token_spread("nap", (16,)) == token_spread("nap", (16,), 0.1, 64, 0)


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="nap, non or mte"):
        regard.get("nap", variant="softmax")
    with pytest.raises(regard.RegardError, match="max or sum"):
        PooledValues(4, "mean")
