"""Checks of kernelized-attention-rpe."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Sizes
from regard.algebra.feature_map import orthogonal_gaussian, positive_random
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.linear.kernelized_attention_rpe import NormalizedPerformerRPE, kernel_attention_rpe, normalised_features


def toeplitz_truth(fq: Tensor, fk: Tensor, v: Tensor, bias: Tensor, causal: bool, wrap: bool = False) -> Tensor:
    n = v.shape[2]
    i = torch.arange(n)
    offset = (i[None] - i[:, None]) % n if wrap else i[None] - i[:, None]
    w = torch.exp(bias[:, offset + (0 if wrap else n - 1)]) * (fq @ fk.mT)
    w = w.tril() if causal else w
    return w / w.sum(-1, keepdim=True) @ v


@check(
    "kernelized-attention-rpe",
    "N = 48 and 37, both directions and causal, with gradients == the Toeplitz-weighted matrix",
    below=1e-8,
    control="offsets taken modulo N",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for n in (48, 37):
        for causal in (False, True):
            fq, fk = torch.rand(2, 1, 2, n, 12, dtype=F64) + 0.1
            v, bias = torch.randn(1, 2, n, 5, dtype=F64), torch.randn(2, 2 * n - 1, dtype=F64)
            leaves = fq, fk, v, bias = tuple(x.requires_grad_() for x in (fq, fk, v, bias))
            out = kernel_attention_rpe(fq, fk, v, bias, causal)
            own.append(gap_with_gradients(out, toeplitz_truth(fq, fk, v, bias, causal), leaves))
            other = min(other, naive.gap(out, toeplitz_truth(fq, fk, v, bias, causal, wrap=True)))
    return max(own), other


@check(
    "kernelized-attention-rpe",
    "a 6 x 7 grid, biases of both differences == the matrix",
    below=1e-10,
    control="differences of columns alone",
)
def _() -> tuple[float, float]:
    fq, fk = torch.rand(2, 1, 2, 42, 12, dtype=F64) + 0.1
    v, bias = torch.randn(1, 2, 42, 5, dtype=F64), torch.randn(2, 11, 13, dtype=F64)
    at = torch.arange(42)
    rows, columns = (x[None] - x[:, None] for x in (at // 7, at % 7))

    def truth(rows: Tensor) -> Tensor:
        w = torch.exp(bias[:, rows + 5, columns + 6]) * (fq @ fk.mT)
        return w / w.sum(-1, keepdim=True) @ v

    out = kernel_attention_rpe(fq, fk, v, bias, grid=(6, 7))
    return naive.gap(out, truth(rows)), naive.gap(out, truth(0 * rows))


@check(
    "kernelized-attention-rpe",
    "b = 0 is plain kernel attention, b = -1000 away from 0 gives v; any length",
    below=1e-10,
    control="b = -1 away from 0",
)
def _() -> tuple[float, float]:
    fq, fk = torch.rand(2, 1, 2, 48, 12, dtype=F64) + 0.1
    v = torch.randn(1, 2, 48, 5, dtype=F64)
    w = fq @ fk.mT
    far = torch.ones(2, 95, dtype=F64)
    far[:, 47] = 0
    gaps = (
        naive.gap(kernel_attention_rpe(fq, fk, v, 0 * far), w / w.sum(-1, keepdim=True) @ v),
        naive.gap(kernel_attention_rpe(fq, fk, v, -1000 * far), v),
    )
    layer = NormalizedPerformerRPE(2, 8, 12, reach=10).double()
    q, k, v2 = qkv(33)
    layer.bias.data.normal_()
    long = layer.bias[:, torch.arange(-32, 33).clamp(-9, 9) + 9]
    same = naive.gap(layer(q, k, v2), toeplitz_truth(*normalised_features(q, k, layer.projection.double()), v2, long, False))
    return max(*gaps, same), naive.gap(kernel_attention_rpe(fq, fk, v, -far), v)


@check(
    "kernelized-attention-rpe",
    "q, k times 1 to 8: mean L1 distance of estimated weights from softmax's, the worst",
    below=0.35,
    control="features of unnormalised q and k, times 4",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(48, 16)
    projection = orthogonal_gaussian(Sizes(1, 2, 2, 48, 48, 16, 5), 64).double()

    def distance(w: Tensor, s: Tensor) -> float:
        return float((w / w.sum(-1, keepdim=True) - torch.softmax(s, -1)).abs().sum(-1).mean())

    own = []
    for c in (1, 2, 4, 8):
        fq, fk = normalised_features(c * q, c * k, projection)
        own.append(distance(fq @ fk.mT, F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT))
    fq, fk = (positive_random(4 * x, projection, 0.0, False) for x in (q, k))
    return max(own), distance(fq @ fk.mT + 1e-300, 16 * q @ k.mT)


@check(
    "kernelized-attention-rpe",
    "the module with a scale, causal and on a 4 x 5 grid: features of unit q and k, a bias of each offset, those beyond the reach alike",
    below=1e-9,
    control="the scale left out",
)
def _() -> tuple[float, float]:
    q, k, v = (x[..., :8] for x in qkv(20))
    own, other = [], math.inf
    at = torch.arange(20)
    for axes, causal in ((1, True), (1, False), (2, False)):
        layer = drawn(NormalizedPerformerRPE(2, 8, 12, reach=4, causal=causal, scale=2.5, axes=axes, seed=3))
        w = orthogonal_gaussian(Sizes(1, 2, 2, 1, 1, 8, 8), 12, seed=3).double()
        if axes == 1:
            bias = layer.bias[:, (at[None] - at[:, None]).clamp(-3, 3) + 3]
        else:
            rows, columns = ((x[None] - x[:, None]).clamp(-3, 3) + 3 for x in (at // 5, at % 5))
            bias = layer.bias[:, rows, columns]

        def truth(scale: float, w: Tensor = w, bias: Tensor = bias, causal: bool = causal) -> Tensor:
            phi = []
            for x in (q, k):
                x = x / x.square().sum(-1, keepdim=True).sqrt() * math.sqrt(scale)
                phi.append(torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2))
            s = torch.exp(bias) * (phi[0] @ phi[1].mT)
            s = s.tril() if causal else s
            return s / s.sum(-1, keepdim=True) @ v

        out = layer(q, k, v, (4, 5) if axes == 2 else None)
        own.append(naive.gap(out, truth(2.5)))
        other = min(other, naive.gap(out, truth(1.0)))
    fresh = NormalizedPerformerRPE(2, 8, reach=4)
    bad = float(fresh.bias.detach().abs().max()) + abs(len(fresh.projection) - 64)  # no bias at the start, 64 features
    fq, fk = torch.rand(2, 1, 2, 12, 6, dtype=F64)
    bias = torch.randn(2, 23, dtype=F64)
    s = torch.exp(bias[:, (at[None, :12] - at[:12, None]) + 11]) * (fq @ fk.mT)
    eps = 0.3 * torch.exp(bias.amax(-1))[:, None, None]  # added to sums over e^(largest bias)
    own.append(naive.gap(kernel_attention_rpe(fq, fk, v[:, :, :12], bias, eps=0.3), s @ v[:, :, :12] / (s.sum(-1, keepdim=True) + eps)))
    return max(bad, *own), other
