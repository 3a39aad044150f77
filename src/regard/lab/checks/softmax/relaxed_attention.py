"""Checks of relaxed-attention."""

from __future__ import annotations

import torch

from regard.algebra import Causal, Padding
from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import identity_values, qkv
from regard.lab.verification import check
from regard.tasks.statistics import entropy
from regard.zoo.softmax.relaxed_attention import RelaxedAttention


def relaxed_row(gamma: float, keys: int | None = None) -> naive.RowWeights:
    return lambda s: (1 - gamma) * naive.softmax(s) + gamma / (keys or len(s))


@check(
    "relaxed-attention",
    "blend of softmax and mean == (1 - g) A + g / n, padding and causal",
    below=1e-12,
    control="1 / T with the padded T",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    keep = (torch.arange(23) < 17)[None]
    mechanism = get("relaxed-attention", gamma=0.2)
    causal = naive.gap(attend(q, k, v, mechanism, mask=Causal()), naive.attention(q, k, v, relaxed_row(0.2), naive.causal))
    padded = attend(q, k, v, mechanism, mask=Padding(), keep=keep)
    truths = [naive.attention(q, k[:, :, :17], v[:, :, :17], relaxed_row(0.2, keys)) for keys in (None, 23)]
    return max(causal, naive.gap(padded, truths[0])), naive.gap(padded, truths[1])


@check("relaxed-attention", "rows sum to one, entropy never falls, gamma = 1 is the mean", below=1e-12, control="gamma = -0.2")
def _() -> tuple[float, float]:
    q, k, _ = qkv(23)
    eye = identity_values(23, 2)
    plain = weights(q, k, "softmax")
    assert plain is not None

    def off(gamma: float) -> float:
        w = attend(q, k, eye, get("relaxed-attention"), blend=torch.tensor((1 - gamma, gamma), dtype=F64))
        return max(naive.gap(w.sum(-1), torch.ones(1, 2, 23)), float((entropy(plain) - entropy(w)).max()))

    uniform = attend(q, k, eye, get("relaxed-attention", gamma=1.0))
    return max(off(0.2), off(0.5), naive.gap(uniform, torch.full_like(uniform, 1 / 23))), off(-0.2)


@check("relaxed-attention", "after training the layer is plain attention, bit for bit", below=0.0, control="matched inference")
def _() -> tuple[float, float]:
    x = torch.randn(2, 19, 32, dtype=F64)

    def gap(when: str) -> float:
        layer = RelaxedAttention(32, 4, 0.2, when).double().eval()
        q, k, v, _ = layer.heads_of(x, x, 0, None)
        return naive.gap(layer(x), layer.close(attend(q, k, v, mask=Causal()), x))

    return gap("train"), gap("matched")
