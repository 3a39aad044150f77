"""Checks of soft."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog import get
from regard.engine.composed import NewtonInverse
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.checks.shared.reduced import eye, qkv
from regard.lab.verification import check
from regard.zoo.linear.soft import SoftmaxFreeAttention


def kernel(x: Tensor, y: Tensor, half: float = 0.5) -> Tensor:
    """exp(-|x_i - y_j|^2 / 2), from the differences."""
    return torch.exp(-half * (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1))


@check(
    "soft",
    "with all 49 tokens as landmarks P A^+ P^T is exp(-|q_i - q_j|^2 / 2) of q / D^(1/4)",
    below=1e-9,
    control="without the 1/2",
)
def _() -> tuple[float, float]:
    q, _, _ = qkv(49, 16)
    out = attend(q, q, eye(49), get("soft", ridge=0.0, iterations=40), landmarks=q)
    return naive.gap(out, kernel(q / 2, q / 2)), naive.gap(out, kernel(q / 2, q / 2, 1.0))


@check(
    "soft",
    "8 landmarks: P A^+ P^T v by inverses in full, with the ridge 0.01 as released and exactly; pooled landmarks are means of runs of q",
    below=1e-9,
    control="the other ridge",
)
def _() -> tuple[float, float]:
    q, marks, v = qkv(48, 16)
    marks = marks[:, :, :8]
    p, a, one = kernel(q / 2, marks / 2), kernel(marks / 2, marks / 2), torch.eye(8, dtype=F64)
    truths = [p @ torch.linalg.inv(a + ridge * one) @ (p.mT @ v) for ridge in (0.01, 0.0)]
    found = [attend(q, q, v, get("soft", mode=mode, iterations=30), landmarks=marks) for mode in ("newton", "exact")]
    pooled = q.unflatten(2, (8, 6)).mean(3)
    same = naive.gap(attend(q, q, v, get("soft", landmarks=8)), attend(q, q, v, "soft", landmarks=pooled))
    return max(same, *[naive.gap(x, y) for x, y in zip(found, truths, strict=True)]), naive.gap(found[0], truths[1])


@check(
    "soft",
    "SOFT++: D^-1/2 A^-1 D^-1/2 with D the row sums of A, the gradient of A among it",
    below=1e-8,
    control="without D",
)
def _() -> tuple[float, float]:
    q, marks, v = qkv(30, 16)
    marks = 1.5 * marks[:, :, :8]
    leaves = q, marks, v = tuple(x.clone().requires_grad_() for x in (q, marks, v))
    p, a = kernel(q / 2, marks / 2), kernel(marks / 2, marks / 2)
    side = a.sum(-1).rsqrt()
    inverse = torch.linalg.inv(a)
    out = attend(q, q, v, get("soft", symmetric=True), landmarks=marks)
    truth = p @ ((side[..., :, None] * inverse * side[..., None, :]) @ (p.mT @ v))
    gaps = [gap_with_gradients(out, truth, leaves)]
    gaps.append(naive.gap(attend(q, q, v, get("soft", mode="released", iterations=30), landmarks=marks), truth))
    return max(gaps), naive.gap(out, p @ inverse @ (p.mT @ v))


@check("soft", "Newton's inverse after 20 steps: max |A+ A - I|", below=1e-8, control="5 steps")
def _() -> tuple[float, float]:
    q, _, _ = qkv(49, 16)
    a = kernel(q / 2, q / 2)
    one = torch.eye(49, dtype=F64)
    return tuple(naive.gap(NewtonInverse.apply(a, 0.0, 1.8, steps) @ a, one.expand_as(a)) for steps in (20, 5))  # type: ignore[return-value]


@check("soft", "its backward equals autograd through torch.linalg.inv, the ridge included", below=1e-9, control="without the ridge")
def _() -> tuple[float, float]:
    q, _, _ = qkv(12, 16)
    a = kernel(q / 2, q / 2).requires_grad_()
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
    truth = kernel(q / 8**0.25, q / 8**0.25)
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


@check(
    "soft",
    "the layer on a 4 x 6 grid == its formula by hand: landmarks by a strided convolution, LayerNorm and GELU, or means; convolution of v",
    below=1e-9,
    control="landmarks without GELU",
)
def _() -> tuple[float, float]:
    x, own, other = torch.randn(2, 24, 16, dtype=F64), [], math.inf
    for options in ({"conv": True}, {"conv": 5}, {"pool": True, "iterations": 25}):
        layer = drawn(SoftmaxFreeAttention(16, 2, (4, 6), mode="newton", **options))  # type: ignore[arg-type]
        q, v = (split(y(x), 2) for y in (layer.q, layer.v))
        q = q / 8**0.25
        cells = (
            q.unflatten(2, (2, 2, 3, 2)).transpose(3, 4).reshape(2, 2, 6, 4, 8)
        )  # (B, heads, landmarks, cell, D), 2 x 2 cells in row order

        def out(marks: Tensor, layer: SoftmaxFreeAttention = layer, q: Tensor = q, v: Tensor = v) -> Tensor:
            p, a = kernel(q, marks), kernel(marks, marks) + 0.01 * torch.eye(6, dtype=F64)
            y = joined(p @ torch.linalg.solve(a, p.mT @ v))
            if layer.conv is not None:
                plane = joined(v).mT.unflatten(-1, (4, 6))
                y = (
                    y
                    + F.conv2d(plane, layer.conv.weight, layer.conv.bias, padding=layer.conv.weight.shape[-1] // 2, groups=16).flatten(2).mT
                )
            return layer.out(y)  # type: ignore[no-any-return]

        if layer.landmark is None:
            own.append(naive.gap(layer(x), out(cells.mean(3))))
            continue
        assert layer.norm is not None and layer.landmark.bias is not None
        marks = torch.einsum("bhmcd,edc->bhme", cells, layer.landmark.weight.flatten(2)) + layer.landmark.bias
        normed = F.layer_norm(marks, (8,)) * layer.norm.weight + layer.norm.bias
        own.append(naive.gap(layer(x), out(normed * (1 + torch.erf(normed / math.sqrt(2))) / 2)))
        other = min(other, naive.gap(layer(x), out(normed)))
    return max(own), other
