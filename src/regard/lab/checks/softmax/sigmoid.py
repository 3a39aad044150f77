"""Checks of sigmoid."""

from __future__ import annotations

import math

import torch

from regard.algebra import Alibi, Causal, Mechanism
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


@check("sigmoid", "tiled == sigmoid(q.k/sqrt(d) + b) v, causal, n = 37", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    truth = naive.attention(q, k, v, lambda s: 1 / (1 + torch.exp(-(s - 1.5))), naive.causal)
    return (
        naive.gap(attend(q, k, v, get("sigmoid", bias=-1.5), mask=Causal()), truth),
        naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth),
    )


@check(
    "sigmoid",
    "gradients with ALiBi, causal, equal those of the formula written out",
    below=1e-10,
    control="without ALiBi",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(19))
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=F64)
    gap = (torch.arange(19)[:, None] - torch.arange(19)).clamp_min(0)
    s = q @ k.transpose(-1, -2) / math.sqrt(8) - slopes[:, None, None] * gap - math.log(19)
    truth = torch.autograd.grad(((torch.sigmoid(s) * torch.ones(19, 19, dtype=F64).tril()) @ v).square().sum(), (q, k, v))
    bias = torch.full((2,), -math.log(19), dtype=F64)
    gaps = []
    for position in (Alibi(), None):
        out = attend(q, k, v, get("sigmoid", position=position), mask=Causal(), bias=bias)
        gaps.append(max(naive.gap(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), truth, strict=True)))
    return gaps[0], gaps[1]


@check("sigmoid", "attention over keys [0:m] plus over [m:n] is the full call", below=1e-12, control="softmax parts added")
def _() -> tuple[float, float]:
    q, k, v = qkv()

    def split(mechanism: Mechanism) -> float:
        parts = attend(q, k[:, :, :15], v[:, :, :15], mechanism) + attend(q, k[:, :, 15:], v[:, :, 15:], mechanism)
        return naive.gap(parts, attend(q, k, v, mechanism))

    return split(get("sigmoid", bias=-3.6)), split(get("softmax"))


@check("sigmoid", "with b = -log n row sums stay near e^0.5 for n = 64..4096", below=2.0, control="b = 0")
def _() -> tuple[float, float]:
    def largest(bias: float | None) -> float:
        sums = []
        for n in (64, 512, 4096):
            q = torch.randn(1, 1, 64, 64, dtype=F64)
            k = torch.randn(1, 1, n, 64, dtype=F64)
            sums.append(float(attend(q, k, torch.ones(1, 1, n, 1, dtype=F64), get("sigmoid", bias=bias)).mean()))
        return max(sums) if min(sums) >= 0.9 else math.inf

    return largest(None), largest(0.0)
