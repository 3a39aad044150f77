"""Checks of adasplash."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import gradcheck

from regard.algebra import Causal, Full, Padding, Segments
from regard.algebra.thresholds import ActiveTiles, halley
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import selection_of
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.softmax.adasplash import entmax_halley
from regard.zoo.softmax.entmax import entmax_weights


def tiled_rows(q: Tensor, k: Tensor, v: Tensor, alpha: float, visible: object) -> Tensor:
    return naive.attention(q, k, v, lambda s: naive.entmax(s, alpha), visible)  # type: ignore[arg-type]


@check(
    "adasplash", "n = 130 in tiles of 64, causal, padded and packed, alpha 1.5 and 2 == entmax row by row", below=1e-9, control="softmax"
)
def _() -> tuple[float, float]:
    q, k, v = qkv(130, std=1.5)
    keep, ids = (torch.arange(130) < 101)[None], (torch.arange(130) >= 77).long()[None]
    gaps = []
    for alpha in (1.5, 2.0):
        mechanism = get("adasplash", alpha=alpha)
        gaps.append(naive.gap(attend(q, k, v, mechanism, mask=Causal()), tiled_rows(q, k, v, alpha, naive.causal)))
        padded = attend(q, k, v, mechanism, mask=Padding(), keep=keep)
        gaps.append(naive.gap(padded, tiled_rows(q, k, v, alpha, lambda i, j: j < 101)))
        packed = attend(q, k, v, mechanism, mask=Causal() & Segments(), segments=ids)
        gaps.append(naive.gap(packed, tiled_rows(q, k, v, alpha, lambda i, j: j <= i and (i >= 77) == (j >= 77))))
    return max(gaps), naive.gap(attend(q, k, v, mask=Causal()), tiled_rows(q, k, v, 1.5, naive.causal))


@check("adasplash", "4 Halley steps on logits of deviation 2: error of alpha = 1.5", below=1e-8, control="4 bisections")
def _() -> tuple[float, float]:
    z = 2 * torch.randn(64, 512, dtype=F64)
    truth = entmax_weights(z, 1.5)
    x, high = z / 2, (z / 2).amax(-1, keepdim=True)
    low, high = high - 1, high - 512**-0.5
    for _ in range(4):
        middle = (low + high) / 2
        heavy = (x - middle).clamp_min(0).square().sum(-1, keepdim=True) >= 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return naive.gap(entmax_halley(z, 1.5, 4), truth), naive.gap((x - (low + high) / 2).clamp_min(0).square(), truth)


@check("adasplash", "gradients of tiles with q, k, v, and of the function: gradcheck (1)", above=1.0, control="thresholds held constant")
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(19, 4))
    z = torch.randn(5, 9, dtype=F64, requires_grad=True)
    mechanism = get("adasplash", block_size=8)

    def held(z: Tensor) -> Tensor:
        tau = halley(z, torch.ones_like(z, dtype=torch.bool), 1.5, 8)
        return (z / 2 - tau).clamp_min(0).square()

    own = gradcheck(lambda q, k, v: attend(q, k, v, mechanism, mask=Causal()), (q, k, v), raise_exception=False, fast_mode=True)
    own = own and gradcheck(entmax_halley, (z,), raise_exception=False)
    return float(own), float(gradcheck(held, (z,), raise_exception=False))


@check(
    "adasplash",
    "keys in blocks: share of tiles left out, where leaving them out changes nothing (gap <= 1e-12)",
    above=0.3,
    control="keys without structure",
)
def _() -> tuple[float, float]:
    def skipped(structured: bool) -> float:
        centres = 4 * torch.randn(8, 16, dtype=F64)
        group = torch.arange(512) // 64 if structured else torch.randint(8, (512,))
        x = centres[group] + 0.3 * torch.randn(512, 16, dtype=F64)
        q = k = x[None, None]
        found = selection_of(ActiveTiles(1.5, 64, worthwhile=1.0), q, k, Full())
        gap = naive.gap(attend(q, k, k, get("adasplash")), attend(q, k, k, get("entmax", alpha=1.5)))
        assert found is not None
        return 1 - found.density if gap <= 1e-12 else math.nan

    return skipped(True), skipped(False)
