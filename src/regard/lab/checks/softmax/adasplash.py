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


@check("adasplash", "n = 70 in tiles of 32, causal, padded and packed, alpha 1.5 and 2 == entmax row by row", below=1e-9, control="softmax")
def _() -> tuple[float, float]:
    q, k, v = qkv(70, heads=1, std=1.5)
    keep, ids = (torch.arange(70) < 51)[None], (torch.arange(70) >= 41).long()[None]
    gaps = []
    for alpha in (1.5, 2.0):
        mechanism = get("adasplash", alpha=alpha, block_size=32)
        gaps.append(naive.gap(attend(q, k, v, mechanism, mask=Causal()), tiled_rows(q, k, v, alpha, naive.causal)))
        padded = attend(q, k, v, mechanism, mask=Padding(), keep=keep)
        gaps.append(naive.gap(padded, tiled_rows(q, k, v, alpha, lambda i, j: j < 51)))
        packed = attend(q, k, v, mechanism, mask=Causal() & Segments(), segments=ids)
        gaps.append(naive.gap(packed, tiled_rows(q, k, v, alpha, lambda i, j: j <= i and (i >= 41) == (j >= 41))))
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


@check(
    "adasplash",
    "the mechanism reads no tile without weight: finite outputs where the values of such tiles are NaN, else equal to entmax row by row",
    above=1.0,
    control="entmax, which reads all tiles",
)
def _() -> tuple[float, float]:
    centres = 4 * torch.linalg.qr(torch.randn(16, 16, dtype=F64))[0][:4]
    group = torch.arange(128) // 32  # queries of the first three groups, keys of four: nobody looks at the last
    q, k = (centres[group[:n]][None, None] + 0.3 * torch.randn(1, 1, n, 16, dtype=F64) for n in (96, 128))
    v = torch.randn(1, 1, 128, 16, dtype=F64)
    truth = naive.attention(q, k, v, lambda s: naive.entmax(s, 1.5))
    spoilt = torch.where((group == 3)[:, None], math.nan, v)

    def finite(name: str) -> float:
        out = attend(q, k, spoilt, get(name, alpha=1.5, **({"block_size": 32} if name == "adasplash" else {})), executor="tiled")
        right = naive.gap(out.nan_to_num(0.0), torch.where(out.isnan(), 0.0, truth)) < 1e-9
        return float(out.isfinite().double().mean()) if right else 0.0

    return finite("adasplash"), finite("entmax")
