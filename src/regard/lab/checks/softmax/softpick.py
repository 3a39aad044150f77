"""Checks of softpick."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.learned import learned
from regard.lab.checks.shared.weighted import qkv, weights_of
from regard.lab.verification import check
from regard.zoo.softmax.attention_sink import trained
from regard.zoo.softmax.softpick import softpick_weights


@check("softpick", "tiles == relu(e^s - 1) / sum|e^s - 1|, causal, n = 77, logits N(0, 3)", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv(77, std=1.7)

    def row(s: Tensor) -> Tensor:
        rise = torch.exp(s) - 1
        return rise.clamp_min(0) / (rise.abs().sum() + 1e-8 * torch.exp(s.max().clamp_min(0)))

    truth = naive.attention(q, k, v, row, naive.causal)
    return naive.gap(attend(q, k, v, "softpick", mask=Causal()), truth), naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


@check("softpick", "row sum is P / (P + N)", below=1e-12, control="softmax rows")
def _() -> tuple[float, float]:
    s = 3 * torch.randn(20, 40, dtype=F64)
    rise = torch.exp(s) - 1
    p, n = rise.clamp_min(0).sum(-1), (-rise).clamp_min(0).sum(-1)
    return naive.gap(weights_of(s, get("softpick", eps=0.0)).sum(-1), p / (p + n)), naive.gap(weights_of(s, "softmax").sum(-1), p / (p + n))


@check("softpick", "adding 1 to every logit changes the weights", above=1e-3, control="softmax, which is shift invariant")
def _() -> tuple[float, float]:
    s = torch.randn(20, 40, dtype=F64)
    return (
        naive.gap(weights_of(s + 1, "softpick"), weights_of(s, "softpick")),
        naive.gap(weights_of(s + 1, "softmax"), weights_of(s, "softmax")),
    )


@check("softpick", "rows of logits -500 give exact zeros and finite gradients in float32", below=0.0, control="softmax rows")
def _() -> tuple[float, float]:
    def total(mechanism: str) -> float:
        q = torch.full((1, 1, 8, 4), -250.0, requires_grad=True)
        k, v = torch.full((1, 1, 8, 4), 1.0), torch.ones(1, 1, 8, 3)
        out = attend(q, k, v, mechanism, executor="tiled")
        (grad,) = torch.autograd.grad(out.sum(), q)
        return float(out.detach().abs().sum() + grad.abs().sum()) if bool(grad.isfinite().all()) else math.inf

    return total("softpick"), total("softmax")


@check("softpick", "the function's gradient equals finite differences", below=1e-6, control="gradient of softmax")
def _() -> tuple[float, float]:
    x = torch.randn(12, dtype=F64, requires_grad=True)
    seed = torch.randn(12, dtype=F64)
    eye = 1e-6 * torch.eye(12, dtype=F64)
    numeric = ((softpick_weights(x.detach() + eye) - softpick_weights(x.detach() - eye)) @ seed) / 2e-6
    (own,) = torch.autograd.grad(softpick_weights(x) @ seed, x)
    (other,) = torch.autograd.grad(x.softmax(-1) @ seed, x)
    return naive.gap(own, numeric), naive.gap(other, numeric)


@check(
    "softpick",
    "share of heads with a sink on the first token, after learning bigrams and copies (accuracy >= 0.95)",
    below=0.05,
    control="softmax",
)
def _() -> tuple[float, float]:
    own, other = learned([trained("softpick"), trained("softmax")])
    return own.sink_rate, other.sink_rate
