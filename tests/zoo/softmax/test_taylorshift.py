"""TaylorShift by hand: coefficients, unit length or not, the layer's scale and choice of form, its steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import regard
from regard.zoo.softmax.taylorshift import TaylorShiftAttention, crossover, crossover_memory


def by_hand(q: Tensor, k: Tensor, v: Tensor, tau: list[float], a: float, b: float, c: float, normalize: bool, causal: bool) -> Tensor:
    out = torch.zeros_like(v)
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            weights = []
            for j in range(i + 1 if causal else k.shape[2]):
                x = tau[h] * float(q[0, h, i] @ k[0, h, j])
                x = x / float(q[0, h, i].norm() * k[0, h, j].norm()) if normalize else x
                weights.append(a * x * x + b * x + c)
            w = torch.tensor(weights, dtype=torch.float64)
            out[0, h, i] = w @ v[0, h, : len(w)] / w.sum()
    return out


@pytest.mark.parametrize("mode", ["efficient", "direct"])
@pytest.mark.parametrize("options", [{}, {"a": 0.7, "b": -0.4, "c": 1.5}, {"normalize": False}])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(mode: str, options: dict[str, float], causal: bool) -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    known = {"a": 0.5, "b": 1.0, "c": 1.0, "normalize": True} | options
    mechanism, mask = regard.get("taylorshift", mode=mode, **options), regard.Causal() if causal else None
    found = regard.attend(q, k, v, mechanism, mask=mask, tau=torch.tensor([0.6, 1.8], dtype=torch.float64))
    torch.testing.assert_close(found, by_hand(q, k, v, [0.6, 1.8], causal=causal, **known))  # type: ignore[arg-type]
    torch.testing.assert_close(regard.attend(q, k, v, mechanism, mask=mask), by_hand(q, k, v, [1.0, 1.0], causal=causal, **known))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["auto", "direct", "efficient"])
def test_the_layer(mode: str) -> None:
    for length in (6, 7):  # head_dim 2: the forms cross at 7
        layer, x = TaylorShiftAttention(4, 2, 0.6, 0.5, 1.1, mode=mode).double(), torch.randn(1, length, 4, dtype=torch.float64)
        torch.nn.init.constant_(layer.inputs.learned["tau"], 1.4)
        q, k, v = (w(x).unflatten(-1, (2, 2)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
        want = by_hand(q, k, v, [1.4, 1.4], 0.6, 0.5, 1.1, True, False) * math.sqrt(length / 2)
        torch.testing.assert_close(layer(x), layer.out(want.transpose(1, 2).flatten(-2)))
        plain = layer.form(length)
        assert plain == (mode if mode != "auto" else "efficient" if length >= 7 else "direct")
        assert type(layer.mechanism) is type(regard.get("taylorshift", mode=plain))


def test_cross_attention_chooses_by_the_keys() -> None:
    layer = TaylorShiftAttention(4, 2)
    layer(torch.randn(1, 3, 4), torch.randn(1, 9, 4))
    assert type(layer.mechanism) is type(regard.get("taylorshift"))
    layer(torch.randn(1, 9, 4), torch.randn(1, 3, 4))
    assert type(layer.mechanism) is type(regard.get("taylorshift", mode="direct"))


@pytest.mark.parametrize("mode", ["direct", "efficient"])
def test_outputs_are_scaled_by_the_keys_that_are_seen(mode: str) -> None:
    """A padded row gets what it gets alone, and other lengths of queries change nothing."""
    layer, x = TaylorShiftAttention(4, 2, mode=mode).double(), torch.randn(2, 9, 4, dtype=torch.float64)
    keep = torch.tensor([[True] * 9, [True, False] * 2 + [True] * 2 + [False] * 3])
    alone = layer(x[1:, keep[1]])
    masks = ({"mask": regard.Padding(), "keep": keep}, {"mask": keep[:, None, None]})
    for given in masks if mode == "direct" else masks[:1]:  # a recurrence takes no table of pairs
        found = layer(x, **given)  # type: ignore[arg-type]
        torch.testing.assert_close(found[1:, keep[1]], alone)
        torch.testing.assert_close(found[0], layer(x[:1])[0])
    torch.testing.assert_close(layer(x[:, :3], x), layer(x)[:, :3])
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16(), mask=regard.Padding(), keep=keep)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), layer(x, mask=regard.Padding(), keep=keep), atol=0.1, rtol=0.1)
    torch.testing.assert_close(layer(x[:, :3], x, mask=regard.Padding(), keep=keep)[1:, :1], alone[:, :1])
    ids = torch.tensor([[0] * 4 + [1] * 5] * 2)
    with pytest.raises(regard.RegardError, match="output_scale=False"):
        layer(x, mask=regard.Segments(), segments=ids)
    layer.output_scale = False
    if mode == "direct":
        packed = layer(x, mask=regard.Segments(), segments=ids)
        torch.testing.assert_close(packed, torch.cat((layer(x[:, :4]), layer(x[:, 4:])), 1))


def test_steps_without_the_output_scale() -> None:
    layer, x = TaylorShiftAttention(4, 2, causal=True, output_scale=False).double(), torch.randn(2, 8, 4, dtype=torch.float64)
    state, outs = None, []
    for t in range(8):
        y, state = layer.step(x[:, t : t + 1], state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))
    with pytest.raises(regard.RegardError, match="output_scale=False"):
        TaylorShiftAttention(4, 2, causal=True).step(torch.randn(1, 1, 4))


def test_defaults_and_where_the_forms_cross() -> None:
    layer = TaylorShiftAttention(8, 2)
    assert layer.mode == "auto" and layer.output_scale and not layer.causal and torch.equal(layer.inputs.learned["tau"], torch.ones(2))
    assert layer.forms == {form: regard.get("taylorshift", mode=form) for form in ("direct", "efficient")}
    assert [crossover(d) for d in (1, 8, 16)] == [3, 73, 273]
    assert [crossover_memory(d) for d in (1, 8, 16)] == [3.0, 48.5, 160.5]


def test_says_what_is_wrong() -> None:
    for wrong in ({"a": 0.0}, {"a": -1.0}, {"c": 0.49}, {"b": 3.0}):
        with pytest.raises(regard.RegardError, match="weights are positive"):
            regard.get("taylorshift", **wrong)
    regard.get("taylorshift", c=0.5)
    with pytest.raises(regard.RegardError, match="efficient or direct"):
        regard.get("taylorshift", mode="auto")
    with pytest.raises(regard.RegardError, match="auto, direct or efficient"):
        TaylorShiftAttention(4, 2, mode="fast")
