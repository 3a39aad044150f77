"""Checks of clipped-softmax."""

from __future__ import annotations

import torch

from regard.algebra import Causal, Weighted, softmax_plus
from regard.catalog import get
from regard.engine import weights
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.learned import learned
from regard.lab.checks.shared.weighted import qkv, weights_of
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.parts import HeadGate
from regard.zoo.softmax.attention_sink import trained


@check("clipped-softmax", "keys with softmax <= alpha / (T + alpha): largest weight and gradient", below=0.0, control="plain softmax")
def _() -> tuple[float, float]:
    s = 1.5 * torch.randn(20, 32, dtype=F64)
    low = s.softmax(-1) <= 4 / 36

    def largest(name: str) -> float:
        x = s.clone().requires_grad_()
        w = weights_of(x, name)
        (grad,) = torch.autograd.grad(w[low].sum(), x)
        w = w.detach()
        return max(float(w[low].abs().max()), float(grad.abs().max()))

    return largest("clipped-softmax"), largest("softmax")


@check(
    "clipped-softmax",
    "T = 32, alpha = 4, logits [5, 0 x 31]: w_1 = 1.125 p_1 - 0.125 = 0.8057, others 0",
    below=1e-4,
    control="plain softmax",
)
def _() -> tuple[float, float]:
    s = torch.zeros(1, 32, dtype=F64)
    s[0, 0] = 5

    def off(name: str) -> float:
        w = weights_of(s, name)[0]
        return max(abs(float(w[0]) - 0.80569), float(w[1:].max()))

    return off("clipped-softmax"), off("softmax")


@check(
    "clipped-softmax",
    "a gate at its fine-tuning start (weights N(0, 0.001^2), times 1 / pi) leaves the layer as it was",
    below=1e-2,
    control="without the factor",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 17, 32, dtype=F64)
    layer = Attention(32, 4, get("clipped-softmax", gamma=0.0, out_gate="head")).double()
    plain = Attention(32, 4, "softmax").double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    truth = plain(x)

    def gap(factor: float) -> float:
        layer.head_gate = HeadGate(32, 4, "head", 0.25, factor, std=1e-3).double()
        return naive.gap(layer(x), truth) / float(truth.detach().abs().max())

    return gap(4.0), gap(1.0)


@check(
    "clipped-softmax",
    "tiny copy task, alpha = 2: mean logit range (max - min) over that of softmax, accuracies >= 0.95",
    below=0.65,
    control="softmax with a sink logit",
)
def _() -> tuple[float, float]:
    runs = learned([trained(one, 2) for one in ("softmax", get("clipped-softmax", alpha=2.0), Weighted(normalizer=softmax_plus()))])
    plain, own, other = (run.logit_range for run in runs)
    return own / plain, other / plain


@check("clipped-softmax", "weights of the layer's mechanism equal clip(...) of its softmax, causal", below=1e-12, control="unclipped")
def _() -> tuple[float, float]:
    q, k, _ = qkv(32)
    p = weights(q, k, "softmax", mask=Causal())
    w = weights(q, k, "clipped-softmax", mask=Causal())
    assert p is not None and w is not None
    seen = torch.ones(32, 32, dtype=torch.bool).tril()
    raw = (1 + 4 / 32) * p - 4 / 32
    return naive.gap(w, raw.clamp(0, 1) * seen), naive.gap(w, raw * seen)
