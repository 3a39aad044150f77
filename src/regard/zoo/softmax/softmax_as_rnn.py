"""Softmax attention as a sum of recurrences, and what may stand in for its denominator (id 8; Mongaras & Larson, 2025).

exp(q.k / sqrt(D)) = sum_n (q^(x)n . k^(x)n) / (D^(n/2) n!):  a state of D^n rows for each order n, numerator and denominator alike
"""

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, FeatureMap, Normalizer, Recipe, Recurrent, RowLocal, Weighted, bind
from regard.algebra.normalizer import SOFTMAX, exp_shifted
from regard.algebra.readouts import ratio
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.decoder import Decoder
from regard.tasks.synthetic import IGNORE, recall


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


KINDS = ("softmax", "length", "clamp", "detach", "gate", "l2", "rms", "layer", "length_rms")


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
        raise RegardError(f"kind={kind!r}; expected one of {', '.join(KINDS)}")
    return Weighted(normalizer=known[kind][0], recipe=known[kind][1])


def ablation(
    kinds: Sequence[str] = (*KINDS, "order 1", "order 2"), *, steps: int = 150, length: int = 32, dim: int = 32, seed: int = 0
) -> dict[str, float]:
    """Which part of softmax matters: for each of `kinds` (of `stabilised`, or "order n": the recurrence cut there) the loss of a one-layer
    decoder of recalled pairs after `steps` steps of 32 sequences, a mean over the last tenth of them; the same text for all."""
    found = {}
    for kind in kinds:
        order = re.fullmatch(r"order (\d+)", kind)
        if order is None and kind not in KINDS:
            raise RegardError(f"kinds has {kind!r}; expected order 1, order 2, ... or one of {', '.join(KINDS)}")
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        mechanism = stabilised(kind) if order is None else taylor_recurrent(int(order[1]))
        model = Decoder(mechanism, vocab=16, dim=dim, layers=1, heads=2)
        optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
        for _ in range(steps):
            tokens, labels = recall(32, length, length // 8, 16, generator)
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        last = losses[-max(1, steps // 10) :]
        found[kind] = sum(last) / len(last)
    return found
