"""Checks of sinkformer."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.autograd import gradcheck

from regard.algebra import Mechanism, Padding
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import identity_values, qkv
from regard.lab.verification import check
from regard.zoo.softmax.sinkformer import attention_flow


@check("sinkformer", "1 iteration is softmax", below=1e-12, control="3 iterations")
def _() -> tuple[float, float]:
    q, k, v = qkv(24)
    truth = naive.attention(q, k, v, naive.softmax)
    return naive.gap(attend(q, k, v, get("sinkformer", iterations=1)), truth), naive.gap(attend(q, k, v, get("sinkformer")), truth)


def dense_weights(q: Tensor, k: Tensor, mechanism: str | Mechanism, **inputs: Tensor) -> Tensor:
    n = k.shape[2]
    return attend(q, k, identity_values(n, q.shape[1]), mechanism, **inputs)


@check("sinkformer", "after 101 iterations rows and columns sum to 1", below=1e-6, control="softmax's columns")
def _() -> tuple[float, float]:
    q, k, _ = qkv(24)

    def off(p: Tensor) -> float:
        return max(float((p.sum(-1) - 1).abs().max()), float((p.sum(-2) - 1).abs().max()))

    return off(dense_weights(q, k, get("sinkformer", iterations=101))), off(dense_weights(q, k, "softmax"))


@check("sinkformer", "a symmetric score matrix gives symmetric converged weights", below=1e-6, control="softmax")
def _() -> tuple[float, float]:
    q, _, _ = qkv(24)

    def skew(p: Tensor) -> float:
        return naive.gap(p, p.transpose(-1, -2))

    return skew(dense_weights(q, q, get("sinkformer", iterations=101))), skew(dense_weights(q, q, "softmax"))


@check("sinkformer", "padded keys get zero weight and rows still sum to 1", below=1e-10, control="padding not masked")
def _() -> tuple[float, float]:
    q, k, _ = qkv(24)
    keep = torch.ones(1, 24, dtype=torch.bool)
    keep[:, 20:] = False
    padded = attend(q, k, identity_values(24, 2), get("sinkformer", iterations=5), mask=Padding(), keep=keep)
    plain = dense_weights(q, k, get("sinkformer", iterations=5))
    return float(padded[..., 20:].abs().max() + (padded.sum(-1) - 1).abs().max()), float(plain[..., 20:].abs().max())


@check(
    "sinkformer",
    "tied symmetric weights: the flow of particles is a gradient (asymmetry of its Jacobian), and its energy falls at every step",
    below=1e-6,
    control="softmax: one iteration",
)
def _() -> tuple[float, float]:
    x, root = torch.randn(9, 3, dtype=F64), torch.randn(3, 3, dtype=F64)
    own, other = (attention_flow(x, root @ root.T / 6, iterations=n, step_size=0.05) for n in (501, 1))
    falling = all(b < a for a, b in itertools.pairwise(own.energy))
    return own.asymmetry if falling else math.inf, other.asymmetry


@check("sinkformer", "gradcheck of 5 unrolled iterations passes (1)", above=1.0, control="the column potential detached")
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(7, 3))

    def passes(detach: bool) -> float:
        mechanism = get("sinkformer", iterations=5, detach_columns=detach)
        return float(gradcheck(lambda q, k, v: attend(q, k, v, mechanism), (q, k, v), raise_exception=False))

    return passes(False), passes(True)
