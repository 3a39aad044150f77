"""Checks of entmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv, weights_of
from regard.lab.verification import check
from regard.tasks import statistics
from regard.zoo.softmax.entmax import entmax_weights


@check("entmax", "alpha = 1.5, 2 and 1.37 equal bisection from the definition", below=1e-10, control="alpha = 1.5 for all")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(20, 64, dtype=F64)
    own, other = 0.0, 0.0
    for alpha in (1.5, 2.0, 1.37):
        truth = torch.stack([naive.entmax(row, alpha) for row in s])
        own = max(own, naive.gap(weights_of(s, get("entmax"), alpha=torch.tensor([alpha], dtype=F64)), truth))
        own = max(own, naive.gap(entmax_weights(s, alpha), truth), naive.gap(weights_of(s, get("entmax", alpha=alpha)), truth))
        other = max(other, naive.gap(entmax_weights(s, 1.5), truth))
    return own, other


@check(
    "entmax",
    "d/dalpha equals central differences at alpha = 1.37, in attention and in the function",
    below=1e-6,
    control="no gradient to alpha",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(19)
    seed = torch.randn(1, 2, 19, 8, dtype=F64)
    alpha = torch.full((2,), 1.37, dtype=F64, requires_grad=True)

    def f(alpha: Tensor) -> Tensor:
        return (attend(q, k, v, "entmax", alpha=alpha, mask=Causal()) * seed).sum()

    (own,) = torch.autograd.grad(f(alpha), alpha)
    eye = 1e-6 * torch.eye(2, dtype=F64)
    numeric = torch.stack([(f(alpha.detach() + e) - f(alpha.detach() - e)) / 2e-6 for e in eye])
    z = torch.randn(30, dtype=F64)
    a = torch.tensor(1.37, dtype=F64, requires_grad=True)
    (mine,) = torch.autograd.grad(entmax_weights(z, a) @ z, a)
    central = (entmax_weights(z, 1.37 + 1e-6) @ z - entmax_weights(z, 1.37 - 1e-6) @ z) / 2e-6
    return max(naive.gap(own, numeric), abs(float(mine - central))), float(numeric.abs().max())


@check("entmax", "alpha = 1.001 is within 1e-2 of softmax", below=1e-2, control="alpha = 2")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(20, 32, dtype=F64)
    truth = s.softmax(-1)
    return naive.gap(entmax_weights(s, 1.001), truth), naive.gap(entmax_weights(s, 2.0), truth)


@check("entmax", "rows sum to one and hold exact zeros (share of zeros, std-2 logits, n = 64)", above=0.3, control="softmax")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(100, 64, dtype=F64)
    p = weights_of(s, "entmax")
    zeros = float((p == 0).double().mean()) if naive.gap(p.sum(-1), torch.ones(100, dtype=F64)) < 1e-10 else 0.0
    return zeros, float((weights_of(s, "softmax") == 0).double().mean())


@check(
    "entmax",
    "statistics of a trained-like head: alpha 1.5 leaves under half of its pairs, and is more confident than softmax",
    below=0.5,
    control="softmax's density",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, std=2.0)
    maps = [weights(q, k, m, mask=Causal()) for m in (get("entmax", alpha=1.5), get("softmax"))]
    assert maps[0] is not None and maps[1] is not None
    surer = bool((statistics.confidence(maps[0]) > statistics.confidence(maps[1])).all())
    return statistics.density(maps[0]) if surer else math.inf, statistics.density(maps[1])
