"""Checks of soft."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from regard.catalog import get
from regard.engine.composed import NewtonInverse, gaussian
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.reduced import eye, qkv
from regard.lab.verification import check


@check("soft", "with all 49 tokens as landmarks P A^+ P^T is the full Gaussian matrix", below=1e-9, control="P P^T, no inverse")
def _() -> tuple[float, float]:
    q, _, _ = qkv(49, 16)
    mechanism = get("soft", ridge=0.0, iterations=40)
    truth = gaussian(q / 2, q / 2)
    p = gaussian(q / 2, q / 2)
    return naive.gap(attend(q, q, eye(49), mechanism, landmarks=q), truth), naive.gap(p @ p.transpose(-1, -2), truth)


@check("soft", "Newton's inverse after 20 steps: max |A+ A - I|", below=1e-8, control="5 steps")
def _() -> tuple[float, float]:
    q, _, _ = qkv(49, 16)
    a = gaussian(q / 2, q / 2)
    one = torch.eye(49, dtype=F64)
    return tuple(naive.gap(NewtonInverse.apply(a, 0.0, 1.8, steps) @ a, one.expand_as(a)) for steps in (20, 5))  # type: ignore[return-value]


@check("soft", "its backward equals autograd through torch.linalg.inv, the ridge included", below=1e-9, control="without the ridge")
def _() -> tuple[float, float]:
    q, _, _ = qkv(12, 16)
    a = gaussian(q / 2, q / 2).requires_grad_()
    seed = torch.randn_like(a)
    one = torch.eye(12, dtype=F64)
    (truth,) = torch.autograd.grad((torch.linalg.inv(a + 0.01 * one) * seed).sum(), a)
    return tuple(
        naive.gap(torch.autograd.grad((NewtonInverse.apply(a, ridge, 1.8, 30) * seed).sum(), a)[0], truth) for ridge in (0.01, 0.0)
    )  # type: ignore[return-value]


@check(
    "soft",
    "smooth 14 x 14 grid, 2 x 2 pooled landmarks: relative error of the Gaussian matrix",
    below=0.01,
    control="dot-product kernel e^{q.k}",
)
def _() -> tuple[float, float]:
    row, column = torch.meshgrid(torch.arange(14, dtype=F64), torch.arange(14, dtype=F64), indexing="ij")
    waves = [f(w * axis / 14 * math.pi) for w in (0.5, 1.0) for axis in (row, column) for f in (torch.sin, torch.cos)]
    q = (torch.stack(waves, -1) + 0.05 * torch.randn(14, 14, 8, dtype=F64)).reshape(1, 1, 196, 8)
    marks = F.avg_pool2d(q.reshape(1, 14, 14, 8).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)[:, None]
    truth = gaussian(q / 8**0.25, q / 8**0.25)
    out = attend(q, q, eye(196, 1), get("soft", ridge=0.0, iterations=40), landmarks=marks)
    dots = torch.exp(q @ q.transpose(-1, -2) / math.sqrt(8))
    return float((out - truth).norm() / truth.norm()), float((dots - truth).norm() / truth.norm())


@check(
    "soft",
    "SOFT++ bounds the spectral norm of the matrix of 400 near-identical tokens",
    below=20.0,
    control="no normalisation",
)
def _() -> tuple[float, float]:
    q = torch.ones(1, 1, 400, 8, dtype=F64) + 0.05 * torch.randn(1, 1, 400, 8, dtype=F64)
    marks = q[:, :, ::8]

    def norm(symmetric: bool) -> float:
        return float(torch.linalg.matrix_norm(attend(q, q, eye(400, 1), get("soft", symmetric=symmetric), landmarks=marks), 2))

    return norm(True), norm(False)
