"""Checks of sa-softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal, Weighted
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv, weights_of
from regard.lab.verification import check


def sa_row(variant: str, c_den: float = 1e-10) -> naive.RowWeights:
    def row(s: Tensor) -> Tensor:
        p = naive.softmax(s)
        if variant == "v1":
            return s * p
        low = min(float(s.min()), 0.0)
        return p * (s - low) / (max(0.0, float(s.max())) - low + c_den)

    return row


@check("sa-softmax", "v1 and v2 == a loop over rows, causal", below=1e-12, control="plain softmax")
def _() -> tuple[float, float]:
    q, k, v = qkv(29, std=1.5)
    gaps = [
        naive.gap(attend(q, k, v, get("sa-softmax", variant=x), mask=Causal()), naive.attention(q, k, v, sa_row(x), naive.causal))
        for x in ("v1", "v2")
    ]
    return max(gaps), naive.gap(attend(q, k, v, "softmax", mask=Causal()), naive.attention(q, k, v, sa_row("v2"), naive.causal))


@check(
    "sa-softmax",
    "logits [20, 0 x 15]: |d w_max / d x_max| of v1 is within 0.1 of 1",
    below=0.1,
    control="plain softmax, whose gradient vanishes",
)
def _() -> tuple[float, float]:
    def slope(name: str | Weighted) -> float:
        s = torch.zeros(1, 16, dtype=F64)
        s[0, 0] = 20
        s.requires_grad_()
        (grad,) = torch.autograd.grad(weights_of(s, name)[0, 0], s)
        return abs(float(grad[0, 0]))

    return abs(slope(get("sa-softmax", variant="v1")) - 1), abs(slope("softmax") - 1)  # type: ignore[arg-type]


@check("sa-softmax", "v2: 0 <= w <= softmax, and w = softmax at the largest logit", below=1e-9, control="v1")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(30, 20, dtype=F64)
    p = s.softmax(-1)
    top = s.argmax(-1, keepdim=True)

    def off(variant: str) -> float:
        w = weights_of(s, get("sa-softmax", variant=variant))
        return max(float(-w.min()), float((w - p).max()), naive.gap(w.gather(-1, top), p.gather(-1, top)))

    return off("v2"), off("v1")
