"""Relaxed attention's layer by hand: in training, in evaluation, matched, with gamma drawn anew, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.zoo.softmax.relaxed_attention import RelaxedAttention, shallow_fusion


@torch.no_grad()
def by_hand(layer: RelaxedAttention, x: Tensor, gamma: float, keep: Tensor | None = None) -> Tensor:
    n, d = len(x), 4
    q, k, v = (w(x).view(n, 3, d) for w in (layer.q, layer.k, layer.v))
    o = torch.zeros(n, 3, d, dtype=torch.float64)
    for h in range(3):
        for i in range(n):
            seen = [j for j in range(n) if (j <= i or not layer.causal) and (keep is None or keep[j])]
            p = (k[seen, h] @ q[i, h] / math.sqrt(d)).softmax(0)
            o[i, h] = ((1 - gamma) * p + gamma / len(seen)) @ v[seen, h]
    return layer.out(o.flatten(1))


@pytest.mark.parametrize("when", ["train", "matched"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer(when: str, causal: bool) -> None:
    layer, x = RelaxedAttention(12, 3, 0.3, when, causal=causal).double(), torch.randn(1, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x[0], 0.3))
    layer.eval()
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x[0], 0.3 if when == "matched" else 0.0))
    keep = torch.tensor([True, True, False, True, True, True, False])
    for mode in (True, False):
        gamma = 0.3 if mode or when == "matched" else 0.0
        layer.train(mode)
        masks = ({"mask": regard.Padding(), "keep": keep[None]}, {"mask": keep[None, None, None]})
        for given in masks:
            torch.testing.assert_close(layer(x, **given)[0], by_hand(layer, x[0], gamma, keep))  # type: ignore[arg-type]


def test_cross_attention() -> None:
    layer = RelaxedAttention(12, 3, 0.3, causal=False).double().eval()
    x, context = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 9, 12, dtype=torch.float64)
    plain = regard.nn.Attention(12, 3, causal=False).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x, context), plain(x, context))
    layer.train()
    mean = layer.v(context).mean(1, keepdim=True).expand(-1, 4, -1)
    q, k, v = (w(y).unflatten(-1, (3, 4)).transpose(1, 2) for w, y in ((layer.q, x), (layer.k, context), (layer.v, context)))
    soft = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(layer(x, context), layer.out(0.7 * soft + 0.3 * mean))


@pytest.mark.parametrize("training", [True, False])
def test_steps(training: bool) -> None:
    layer, x = RelaxedAttention(12, 3, 0.3, rope=True).double().train(training), torch.randn(2, 7, 12, dtype=torch.float64)
    state, outs = None, []
    for a, b in ((0, 1), (1, 3), (3, 7)):
        y, state = layer.step(x[:, a:b], state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))
    assert state is not None and state.position == 7


def test_gamma_drawn_at_every_step_of_training() -> None:
    layer, x = RelaxedAttention(12, 3, 0.3, fuzzy_std=0.2).double(), torch.randn(1, 7, 12, dtype=torch.float64)
    for seed in range(3):
        torch.manual_seed(seed)
        gamma = 0.3 + 0.2 * float(torch.randn(()))
        torch.manual_seed(seed)
        torch.testing.assert_close(layer(x)[0], by_hand(layer, x[0], min(1.0, max(0.0, gamma))), atol=1e-6, rtol=1e-6)
    for std, ends in ((1e6, (0.0, 1.0)),):
        layer.fuzzy_std = std
        found = [layer(x)[0] for _ in range(8)]
        wants = [by_hand(layer, x[0], end) for end in ends]
        assert all(min(float((y - want).detach().abs().max()) for want in wants) < 1e-6 for y in found)
    layer.eval()
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x[0], 0.0))
    matched = RelaxedAttention(12, 3, 0.3, "matched", 0.2).double().eval()
    torch.testing.assert_close(matched(x)[0], by_hand(matched, x[0], 0.3))


def test_defaults_and_refusals() -> None:
    layer = RelaxedAttention(12, 3)
    assert (layer.gamma, layer.when, layer.fuzzy_std) == (0.1, "train", 0.0)
    q, k, v = (torch.randn(1, 1, 5, 4, dtype=torch.float64) for _ in range(3))
    want = 0.9 * torch.nn.functional.scaled_dot_product_attention(q, k, v) + 0.1 * v.mean(2, keepdim=True)
    torch.testing.assert_close(regard.attend(q, k, v, "relaxed-attention"), want)
    for gamma in (-0.1, 1.1):
        with pytest.raises(regard.RegardError, match="from 0 to 1"):
            regard.get("relaxed-attention", gamma=gamma)
    regard.get("relaxed-attention", gamma=1.0)
    with pytest.raises(regard.RegardError, match="train or matched"):
        RelaxedAttention(12, 3, when="eval")


@pytest.mark.parametrize("wrong", [{"count": 0}, {"beams": 0}, {"weight": -0.1}, {"internal_weight": -0.1}, {"internal_weight": 0.1}])
def test_fused_decoding_refuses_numbers_that_mean_nothing(wrong: dict[str, float]) -> None:
    def even(ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 3)

    given = {"count": 1, **wrong}
    for internal in (None, even):
        if not (internal is even and wrong == {"internal_weight": 0.1}):
            with pytest.raises(regard.RegardError, match="expected positive numbers"):
                shallow_fusion(even, even, torch.zeros(1, 1, dtype=torch.long), internal=internal, **given)  # type: ignore[arg-type]
    assert shallow_fusion(even, even, torch.zeros(1, 1, dtype=torch.long), 1, weight=0.0, beams=9).shape == (1, 2)
