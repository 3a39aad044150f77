"""Measures of generated sequences: spectra, texts, point sets and pictures against the true ones."""

from __future__ import annotations

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError


def spectral_distortion(x: Tensor, y: Tensor) -> float:
    """Mean over frames of the root mean square difference of log spectra (B, T, channels); frame meets frame."""
    return float((x - y).square().mean(-1).sqrt().mean())


def mel_cepstral_distortion(x: Tensor, y: Tensor, kept: int = 13) -> float:
    """Mean over frames of (10 / ln 10) sqrt(2 sum_{d=1..kept} (c_d - c'_d)^2), in decibels, c the orthonormal cosine transform (DCT-II) of log spectra
    (B, T, channels) without its first coefficient; frame meets frame."""
    n = x.shape[-1]
    at = torch.arange(n, dtype=torch.float64)
    basis = math.sqrt(2 / n) * torch.cos(math.pi / n * (at + 0.5) * torch.arange(1, min(kept, n - 1) + 1)[:, None])
    change = (x - y).double() @ basis.T
    return float((10 / math.log(10) * (2 * change.square().sum(-1)).sqrt()).mean())


def rouge(x: Tensor, y: Tensor, kind: str = "1") -> float:
    """ROUGE-1, -2 or -L: 100 times the mean F1 of common words, pairs of words, or the longest common subsequence, of ids (B, T) and (B, T')."""
    if kind not in ("1", "2", "L"):
        raise RegardError(f"kind={kind!r}; expected '1', '2' or 'L'")
    found = []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if kind == "L":
            common, sizes = longest(a, b), (len(a), len(b))
        else:
            n = int(kind)
            grams = [Counter(tuple(one[at : at + n]) for at in range(len(one) - n + 1)) for one in (a, b)]
            common, sizes = (grams[0] & grams[1]).total(), (grams[0].total(), grams[1].total())
        found.append(2 * common / sum(sizes) if sum(sizes) else 0.0)  # 2 P R / (P + R) with P = common / |a|, R = common / |b|
    return 100 * sum(found) / len(found)


def longest(a: list[int], b: list[int]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for at, other in enumerate(b):
            row.append(before[at] + 1 if word == other else max(row[at], before[at + 1]))
    return row[-1]


def chamfer(x: Tensor, y: Tensor, power: int = 1) -> Tensor:
    """The mean distance of each point (B, N, D) from the nearest of the other set (B, M, D). power 1: the mean of both ways; 2: the sum of both
    ways' squared distances."""
    if power not in (1, 2):
        raise RegardError(f"power={power}; expected 1 or 2")
    square = (x[:, :, None] - y[:, None]).square().sum(-1)
    near = square.amin(2), square.amin(1)
    if power == 2:
        return near[0].mean() + near[1].mean()
    return ((near[0] + 1e-12).sqrt().mean() + (near[1] + 1e-12).sqrt().mean()) / 2  # a square root without a slope at 0


def f_score(x: Tensor, y: Tensor, within: float = 0.1) -> float:
    """2 P R / (P + R): the shares of points closer than `within` to the other set, from x to y and from y to x, averaged over the batch."""
    far = torch.cdist(x, y)
    p, r = ((far.amin(d) < within).double().mean(1) for d in (2, 1))
    return float((2 * p * r / (p + r).clamp_min(1e-12)).mean())


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over pictures (B, H, W) in [0, 1] of -10 log10(mean squared error); at most 100, where they are equal."""
    error = (x - y).double().square().mean((1, 2)).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())


def ssim(x: Tensor, y: Tensor, window: int = 7) -> float:
    """Mean structural similarity of pictures (B, H, W) in [0, 1]: over whole window x window squares, sample variances, K1 = 0.01, K2 = 0.03."""
    if min(x.shape[-2:]) < window:
        raise RegardError(f"pictures {tuple(x.shape)}; expected sides of window={window} or more")

    def mean(z: Tensor) -> Tensor:
        return F.avg_pool2d(z[:, None], window, 1)

    x, y = x.double(), y.double()
    a, b = mean(x), mean(y)
    sample = window**2 / (window**2 - 1)
    va, vb, both = (sample * (mean(p * q) - s * t) for p, q, s, t in ((x, x, a, a), (y, y, b, b), (x, y, a, b)))
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * a * b + c1) * (2 * both + c2) / ((a**2 + b**2 + c1) * (va + vb + c2))).mean())
