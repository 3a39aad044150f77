"""Checks of performer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from regard.algebra import Sizes
from regard.algebra.feature_map import orthogonal_gaussian, positive_random
from regard.catalog import get
from regard.engine.door import attend
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.recurrent import qkv
from regard.lab.verification import check


def feature_error(m: int, copies: int = 1) -> float:
    """Mean relative Frobenius error of the estimated softmax kernel on 64 x 16 inputs of std 0.5, scaled by D^(-1/4).

    copies: how often the same m features are used, in place of new ones.
    """
    errors = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(1000 + seed)
        x, y = (0.5 * 16**-0.25 * torch.randn(64, 16, generator=generator, dtype=F64) for _ in range(2))
        truth = torch.exp(x @ y.T)
        w = orthogonal_gaussian(Sizes(1, 1, 1, 1, 1, 16, 16), m, seed=seed).to(F64).repeat(copies, 1)
        phi = [positive_random(z, w, 0.0, False) for z in (x, y)]
        errors.append(float((phi[0] @ phi[1].T - truth).norm() / truth.norm()))
    return sum(errors) / len(errors)


@check(
    "performer",
    "the kernel's error falls with every fourfold m from 16: err(1024) / err(64)",
    below=0.45,
    control="16 copies of the 64 features",
)
def _() -> tuple[float, float]:
    errors = {m: feature_error(m) for m in (16, 64, 256, 1024)}
    falling = errors[16] > errors[64] > errors[256] > errors[1024]
    return errors[1024] / errors[64] if falling else math.inf, feature_error(64, 16) / errors[64]


@check(
    "performer",
    "orthogonal features are unbiased: |mean / truth - 1| over 6000 draws of 8 features",
    below=0.015,
    control="QR without the sign fix",
)
def _() -> tuple[float, float]:
    draws = torch.stack([orthogonal_gaussian(Sizes(1, 1, 1, 1, 1, 8, 8), 8, seed=seed) for seed in range(6000)]).to(F64)
    x, y = torch.zeros(8, dtype=F64), torch.zeros(8, dtype=F64)
    x[0], y[0], y[1] = 0.9, 0.9 * math.cos(0.4), 0.9 * math.sin(0.4)
    shape = positive_random(torch.stack((x, y)), draws.flatten(0, 1), 0.0, False) * math.sqrt(6000 * 8)
    own = float((shape[0] * shape[1]).mean() / torch.exp(x @ y))
    turn, _ = torch.linalg.qr(torch.randn(6000, 8, 8, dtype=F64))
    w = (turn * torch.randn(6000, 8, 8, dtype=F64).norm(dim=-1, keepdim=True)).flatten(0, 1)
    skew = positive_random(torch.stack((x, y)), w, 0.0, False) * math.sqrt(6000 * 8)
    return abs(own - 1), abs(float((skew[0] * skew[1]).mean() / torch.exp(x @ y)) - 1)


@check("performer", "iid features' squared error over its closed form, |log ratio|", below=0.15, control="without exp(-|x|^2/2)")
def _() -> tuple[float, float]:
    d = m = 8
    x, y = (F.normalize(torch.randn(d, dtype=F64), dim=0) * 0.9 for _ in range(2))
    w = torch.randn(40_000, m, d, dtype=F64)
    truth = float(torch.exp(x @ y))
    total = float((x + y).square().sum())
    closed = math.exp(total) * truth**2 * (1 - math.exp(-total)) / m

    def squared(damping: float) -> float:
        estimate = (torch.exp(w @ x - damping * 0.405) * torch.exp(w @ y - damping * 0.405)).mean(-1)
        return float((estimate - truth).square().mean())

    return abs(math.log(squared(1.0) / closed)), abs(math.log(squared(0.0) / closed))


@check("performer", "the mechanism approaches softmax attention: relative error with m = 4096", below=0.25, control="m = 16")
def _() -> tuple[float, float]:
    q, k, v = (0.7 * x for x in qkv(48, 16, 16))
    truth = attend(q, k, v, "softmax")
    size = float(truth.abs().mean())
    errors = [float((attend(q, k, v, get("performer", features=m)) - truth).abs().mean()) / size for m in (4096, 16)]
    return errors[0], errors[1]


@check("performer", "share of negative estimated weights (inputs of std 0.7)", below=0.0, control="trigonometric features")
def _() -> tuple[float, float]:
    x, y = 0.7 * torch.randn(64, 16, dtype=F64), 0.7 * torch.randn(64, 16, dtype=F64)
    w = torch.randn(32, 16, dtype=F64)
    own = positive_random(x, w, 0.0, False) @ positive_random(y, w, 0.0, False).T
    waves = [torch.cat((torch.sin(z @ w.T), torch.cos(z @ w.T)), -1) * torch.exp(z.square().sum(-1, keepdim=True) / 2) for z in (x, y)]
    return float((own < 0).double().mean()), float((waves[0] @ waves[1].T < 0).double().mean())
