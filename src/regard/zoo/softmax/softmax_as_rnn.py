"""Softmax attention as a sum of recurrences, and what may stand in for its denominator (id 8; Mongaras & Larson, 2025).

exp(q.k / sqrt(D)) = sum_n (q^(x)n . k^(x)n) / (D^(n/2) n!):  a state of D^n rows for each order n, numerator and denominator alike
"""

import math

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Normalizer, Recipe, Recurrent, RowLocal, Weighted, bind
from regard.algebra.normalizer import SOFTMAX, exp_shifted
from regard.algebra.readouts import ratio
from regard.catalog.registry import register
from regard.errors import RegardError


def tensor_powers(x: Tensor, order: int) -> Tensor:
    """[1, x, x (x) x, ...] with phi(q).phi(k) = sum_{n <= order} (q.k)^n / (D^(n/2) n!): D^0 + ... + D^order features."""
    d = x.shape[-1]
    parts, power = [torch.ones_like(x[..., :1])], torch.ones_like(x[..., :1])
    for n in range(1, order + 1):
        power = (power.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
        parts.append(power / math.sqrt(math.factorial(n) * d ** (n / 2)))
    return torch.cat(parts, -1)


def series(s: Tensor, d: int, order: int) -> Tensor:
    """sum_{n <= order} x^n / n!, x = s / sqrt(D)."""
    total = term = torch.ones_like(s)
    for n in range(1, order + 1):
        term = term * s / (math.sqrt(d) * n)
        total = total + term
    return total


@register("softmax-as-rnn")
def taylor_recurrent(order: int = 2) -> Recurrent:
    """order 0 is a running mean of the values, 1 linear attention with [1, k / D^(1/4)], and order -> infinity softmax. Odd orders may
    divide by a sum near zero where q.k / sqrt(D) < -1."""
    if order < 0:
        raise RegardError(f"order={order}: expected 0 or more")
    return Recurrent(FeatureMap(bind(tensor_powers, order=order), kernel=bind(series, order=order)), readout=ratio, scaled=False)


def taylor_recurrent_attention(q: Tensor, k: Tensor, v: Tensor, order: int) -> Tensor:
    """Causal attention by recurrences of orders 0..order; shapes as `regard.attend`."""
    from regard.algebra import Causal
    from regard.engine.door import attend

    return attend(q, k, v, taylor_recurrent(order), mask=Causal())


def exp_clamped(s: Tensor) -> Tensor:
    """e^min(s, 5): without a denominator logits are clamped, as in the released training code."""
    return torch.exp(s.clamp(max=5.0))


def visible(total: Tensor, n: Tensor) -> Tensor:
    return n.clamp_min(1)


def at_least_one(total: Tensor) -> Tensor:
    return total.clamp_min(1)


def detached(total: Tensor) -> Tensor:
    return total.detach()


def stabilised(kind: str) -> Weighted:
    """Softmax attention with another denominator.

    "softmax"; "length": divide by the visible keys; "clamp": by max(sum, 1); "detach": by the sum, without its gradient; "gate": by nothing,
    times sigmoid(W_g x) a head; "l2", "rms", "layer": by nothing, then that norm over head_dim; "length_rms": by length, then RMSNorm.
    """
    bare = RowLocal(exp_clamped)
    by_length = RowLocal(exp_clamped, divide=visible)
    known: dict[str, tuple[Normalizer, Recipe]] = {
        "softmax": (SOFTMAX, Recipe()),
        "length": (by_length, Recipe()),
        "clamp": (RowLocal(exp_clamped, exp_clamped, at_least_one), Recipe()),
        "detach": (RowLocal(exp_shifted, exp_shifted, detached, shift="max"), Recipe()),
        "gate": (bare, Recipe(out_gate="heads")),
        "l2": (bare, Recipe(out_norm="l2")),
        "rms": (bare, Recipe(out_norm="rms")),
        "layer": (bare, Recipe(out_norm="layer")),
        "length_rms": (by_length, Recipe(out_norm="rms")),
    }
    if kind not in known:
        raise RegardError(f"kind={kind!r}; expected one of {', '.join(known)}")
    return Weighted(normalizer=known[kind][0], recipe=known[kind][1])
