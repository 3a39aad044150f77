"""Checks of fast-attention."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from regard.algebra import Causal, FeatureMap, Recurrent
from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
from regard.lab.checks.shared.weighted import qkv
from regard.lab.memory import peak_bytes
from regard.lab.verification import check


def polynomial(q: Tensor, k: Tensor, p: int, causal: bool, factor: float = 0.5) -> Tensor:
    q, k = (((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()) for x in (q, k))
    x = q @ k.mT / math.sqrt(q.shape[-1])
    f = 1 + x + (factor * x * x if p == 2 else 0)
    f = f.tril() if causal else f
    return f / f.sum(-1, keepdim=True)


@check(
    "fast-attention",
    "p = 1 and 2, causal and not, with gradients == the polynomial's matrix, relative",
    below=1e-9,
    control="x^2 without the 1/2",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(40, 6))
    own, other = [], 0.0
    for p in (1, 2):
        for causal in (False, True):
            truth = polynomial(q, k, p, causal) @ v
            out = attend(q, k, v, get("fast-attention", p=p), mask=Causal() if causal else None)
            size = float(truth.detach().abs().max())  # rows of p = 1 may sum to nearly nothing
            own.append(gap_with_gradients(out / size, truth / size, leaves) / max(1.0, size))
            other = naive.gap(out, polynomial(q, k, p, causal, 1.0) @ v)
    return max(own), other


@check("fast-attention", "p = 2: smallest weight before division, less 1/2", above=-1e-9, control="p = 1")
def _() -> tuple[float, float]:
    q, k, _ = qkv(40, 6)

    def least(p: int) -> float:
        x = 3 * q @ k.mT / math.sqrt(6)
        sums = (1 + x + (x * x / 2 if p == 2 else 0)).sum(-1, keepdim=True)
        w = weights(3 * q, k, get("fast-attention", p=p, normalize="none"))
        assert w is not None
        return float((w * sums - 0.5).min())

    return least(2), least(1)


@check(
    "fast-attention",
    "over the sequence's largest norm, or as they are, at other temperatures, with gradients == the polynomial's matrix",
    below=1e-9,
    control="the other normalisation",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(30, 6))
    own, other = [], math.inf

    def matrix(p: int, c: float, over: bool) -> Tensor:
        a, b = (x / x.square().sum(-1).sqrt().amax(-1)[..., None, None] if over else x for x in (q, k))
        x = a @ b.mT / c
        f = 1 + x + (x * x / 2 if p == 2 else 0)
        return f / f.sum(-1, keepdim=True)

    for p, c in ((1, 0.5), (2, 3.0)):
        for kind in ("sequence", "none"):
            out = attend(q, k, v, get("fast-attention", p=p, normalize=kind, temperature=c))
            truth = matrix(p, c, kind == "sequence") @ v
            size = max(1.0, float(truth.detach().abs().max()))
            own.append(gap_with_gradients(out / size, truth / size, leaves) / size)
            other = min(other, naive.gap(out, matrix(p, c, kind != "sequence") @ v))
    causal = attend(q, k, v, get("fast-attention", normalize="none", temperature=3.0), mask=Causal())
    past = (1 + q @ k.mT / 3 + (q @ k.mT / 3) ** 2 / 2).tril()
    own.append(naive.gap(causal, past / past.sum(-1, keepdim=True) @ v))
    return max(own), other


@check("fast-attention", "|x| <= 0.1: relative distance from softmax", below=3e-4, control="p = 1")
def _() -> tuple[float, float]:
    q, k, v = qkv(40, 6)
    q, k = (x / x.norm(dim=-1, keepdim=True) * math.sqrt(0.1 * math.sqrt(6)) for x in (q, k))
    truth = attend(q, k, v)
    found = [naive.gap(attend(q, k, v, get("fast-attention", p=p, normalize="none")), truth) / float(truth.abs().max()) for p in (2, 1)]
    return found[0], found[1]


@check(
    "fast-attention",
    "causal forward and backward at N = 8192, D = 32: peak bytes over N x D^2 x 4",
    below=1.0,
    control="features of all tokens kept",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(torch.randn(1, 1, 8192, 32, requires_grad=True) for _ in range(3))
    mechanism = get("fast-attention")
    assert isinstance(mechanism, Recurrent) and isinstance(mechanism.feature, FeatureMap)
    kept = replace(mechanism, feature=replace(mechanism.feature, kernel=None))

    def peak(m: object) -> float:
        def run() -> None:
            torch.autograd.grad(attend(q, k, v, m, mask=Causal()).sum(), leaves)  # type: ignore[arg-type]

        return peak_bytes(run) / (8192 * 32**2 * 4)

    return peak(mechanism), peak(kept)
