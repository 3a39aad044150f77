"""Checks of performer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Sizes
from regard.algebra.feature_map import orthogonal_gaussian, positive_random
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.recurrent import qkv
from regard.lab.verification import check
from regard.zoo.linear.performer import redraw


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
    "orthogonal features are unbiased: |mean / truth - 1| over 24000 draws of 8 features",
    below=0.015,
    control="QR without the sign fix",
)
def _() -> tuple[float, float]:
    draws = 24_000
    rows = orthogonal_gaussian(Sizes(1, 1, 1, 1, 1, 8, 8), 8 * draws).to(F64)  # every 8 rows are a draw
    x, y = torch.zeros(8, dtype=F64), torch.zeros(8, dtype=F64)
    x[0], y[0], y[1] = 0.9, 0.9 * math.cos(0.4), 0.9 * math.sin(0.4)
    turn, _ = torch.linalg.qr(torch.randn(draws, 8, 8, dtype=F64))
    skew = (turn * torch.randn(draws, 8, 8, dtype=F64).norm(dim=-1, keepdim=True)).flatten(0, 1)

    def bias(w: Tensor) -> float:
        phi = positive_random(torch.stack((x, y)), w, 0.0, False)
        return abs(float((phi[0] * phi[1]).sum() / torch.exp(x @ y)) - 1)

    return bias(rows), bias(skew)


@check(
    "performer",
    "rows of a block are orthogonal, their lengths those of normal vectors, or sqrt(D) if regularised",
    below=0.05,
    control="rows drawn apart",
)
def _() -> tuple[float, float]:
    sizes = Sizes(1, 1, 1, 1, 1, 8, 8)

    def cosine(w: Tensor) -> float:
        unit = F.normalize(w.double().view(-1, 8, 8), dim=-1)
        return float((unit @ unit.mT - torch.eye(8, dtype=F64)).abs().max())

    w, even = orthogonal_gaussian(sizes, 8 * 400), orthogonal_gaussian(sizes, 8 * 400, regularised=True)
    square = w.double().square().sum(-1)  # chi squared with 8 degrees of freedom: mean 8, variance 16
    moments = max(abs(float(square.mean()) / 8 - 1), abs(float(square.var()) / 16 - 1) / 4)
    lengths = naive.gap(even.double().norm(dim=-1), torch.full((3200,), 8**0.5, dtype=F64))
    return max(cosine(w), cosine(even), moments, lengths), cosine(orthogonal_gaussian(sizes, 8 * 400, orthogonal=False))


@check("performer", "iid features' squared error over its closed form, |log ratio|", below=0.15, control="hyperbolic features")
def _() -> tuple[float, float]:
    x, y = (F.normalize(torch.randn(8, dtype=F64), dim=0) * 0.9 for _ in range(2))
    truth, total = float(torch.exp(x @ y)), float((x + y).square().sum())
    closed = math.exp(total) * truth**2 * (1 - math.exp(-total)) / 8
    draws = orthogonal_gaussian(Sizes(1, 1, 1, 1, 1, 8, 8), 8 * 40_000, orthogonal=False).to(F64)

    def squared(hyperbolic: bool) -> float:
        phi = positive_random(torch.stack((x, y)), draws, 0.0, hyperbolic) * math.sqrt((2 if hyperbolic else 1) * len(draws))
        each = (phi[0] * phi[1]).unflatten(0, (-1, len(draws)))  # hyperbolic: of w and of -w
        return float((each.mean(0).view(-1, 8).mean(-1) - truth).square().mean())

    return abs(math.log(squared(False) / closed)), abs(math.log(squared(True) / closed))


def features_by_hand(x: Tensor, w: Tensor, hyperbolic: bool) -> tuple[Tensor, Tensor]:
    """w.x of every feature, and |x|^2 / 2, x scaled by D^(-1/4)."""
    x = x / x.shape[-1] ** 0.25
    at = torch.stack([(x * row).sum(-1) for row in w], -1)
    return torch.cat((at, -at), -1) if hyperbolic else at, x.square().sum(-1, keepdim=True) / 2


@check(
    "performer",
    "FAVOR+ in both directions, causal and hyperbolic, with its eps and shifts == features and sums by hand; other kernels too",
    below=1e-9,
    control="without the eps",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(20, 8)
    w = torch.randn(6, 8, dtype=F64)
    own, other = [], math.inf
    for hyperbolic in (False, True):
        for causal in (False, True):
            (a, x), (b, y) = (features_by_hand(z, w, hyperbolic) for z in (q, k))
            top = torch.tensor(0.0 if causal else 1.0) * b.amax((-1, -2), keepdim=True)
            m = a.shape[-1]

            def truth(
                eps: float, a: Tensor = a, x: Tensor = x, b: Tensor = b, y: Tensor = y, top: Tensor = top, m: int = m, causal: bool = causal
            ) -> Tensor:
                fq, fk = torch.exp(a - x - a.amax(-1, keepdim=True)) + eps, torch.exp(b - y - top) + eps
                s = (fq @ fk.mT).tril() if causal else fq @ fk.mT
                more = m**0.5 * 1e-6 * fq.sum(-1, keepdim=True) if causal else 0.0  # eps of the sum of key features, each over sqrt(m)
                return s @ v / (s.sum(-1, keepdim=True) + more)

            mechanism = get("performer", features=6, hyperbolic=hyperbolic, eps=0.01)
            out = attend(q, k, v, mechanism, mask=Causal() if causal else None, projection=w)
            own.append(naive.gap(out, truth(0.01)))
            other = min(other, naive.gap(out, truth(0.0)))
    for name, function in (("relu", lambda z: z.clamp_min(0)), ("exp", torch.exp), ("gelu", F.gelu), ("softplus", F.softplus)):
        for normalize in (False, True):
            fq, fk = (function(z / (8**0.25 if normalize else 1) @ w.T) + 0.02 for z in (q, k))
            out = attend(q, k, v, get("performer", features=6, kernel=name, eps=0.02, normalize=normalize), projection=w)
            own.append(naive.gap(out, (fq @ fk.mT) @ v / (fq @ fk.mT).sum(-1, keepdim=True)))
    defaults = [get("performer", features=6), get("performer", features=6, eps=1e-4)]
    own.append(naive.gap(*(attend(q, k, v, m, projection=w) for m in defaults)))
    defaults = [get("performer", features=6, kernel="relu"), get("performer", features=6, kernel="relu", eps=1e-3)]
    own.append(naive.gap(*(attend(q, k, v, m, projection=w) for m in defaults)))
    return max(own), other


@check(
    "performer",
    "a redrawn projection is another; the same seed gives the same, the mechanism's own draw",
    below=0.0,
    control="seeds 0 and 1",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(20, 8)
    out = attend(q, k, v, get("performer", features=24, seed=1))
    found = [naive.gap(attend(q, k, v, get("performer", features=24), projection=redraw(8, 24, seed)), out) for seed in (1, 0)]
    return found[0], found[1]


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
