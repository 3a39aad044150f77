"""Checks of flatten."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.grids import around
from regard.lab.checks.shared.layers import drawn, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.images.grid import GridAttention
from regard.zoo.linear.flatten import focused


@check("flatten", "linear path with gradients == the quadratic order, norms over all heads' channels", below=1e-8, control="norms a head")
def _() -> tuple[float, float]:
    q, k, v = qkv(49, 16)
    a = torch.randn(2, 16, dtype=F64)
    leaves = q, k, v, a = tuple(x.requires_grad_() for x in (q, k, v, a))

    def truth(dims: tuple[int, ...]) -> Tensor:
        def focus(x: Tensor) -> Tensor:
            x = (x.clamp_min(0) + 1e-6) / torch.log1p(torch.exp(a))[:, None]
            return x**3 * (x**2).sum(dims, keepdim=True).sqrt() / (x**6).sum(dims, keepdim=True).sqrt()

        w = focus(q) @ focus(k).mT
        return w / (w.sum(-1, keepdim=True) + 49e-6) @ v

    out = attend(q, k, v, "flatten", sharpness=a)
    return gap_with_gradients(out, truth((1, 3)), leaves), naive.gap(out, truth((3,)))


@check("flatten", "|f_3(x)| == |x|", below=1e-12, control="the power over its own norm")
def _() -> tuple[float, float]:
    x = torch.rand(5, 100, 16, dtype=F64) + 1e-3
    found = [float((y.norm(dim=-1) - x.norm(dim=-1)).abs().max()) for y in (focused(x, 3.0), F.normalize(x**3, dim=-1))]
    return found[0], found[1]


@check(
    "flatten",
    "gap of cosines between pairs of the same and of another largest channel, p = 3 over p = 1",
    above=3,
    control="p = 1.2 over p = 1",
)
def _() -> tuple[float, float]:
    x, y = torch.rand(2, 2000, 16, dtype=F64)
    same = x.argmax(-1) == y.argmax(-1)

    def apart(power: float) -> float:
        near = F.cosine_similarity(focused(x, power), focused(y, power), dim=-1)
        return float(near[same].mean() - near[~same].mean())

    return apart(3) / apart(1), apart(1.2) / apart(1)


@check(
    "flatten",
    "14 x 14 grid, D = 16: rank of the implied matrix with the depthwise convolution",
    above=196,
    control="of the kernel part alone",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(196, 16)
    kernel = weights(q, k, "flatten")[0, 0]  # type: ignore[index]
    conv = torch.nn.Conv2d(1, 1, 5, padding=2, bias=False).double()
    toeplitz = conv(torch.eye(196, dtype=F64).view(196, 1, 14, 14)).detach().view(196, 196).T
    return int(torch.linalg.matrix_rank(kernel + toeplitz)), int(torch.linalg.matrix_rank(kernel))


def focus(x: Tensor, a: Tensor, power: float, dims: tuple[int, ...]) -> Tensor:
    """(relu(x) + 1e-6) / softplus(a), raised to a power and brought back to its norm over `dims`."""
    x = (x.clamp_min(0) + 1e-6) / torch.log1p(torch.exp(a))[:, None]
    y = x**power
    return y * x.square().sum(dims, keepdim=True).sqrt() / y.square().sum(dims, keepdim=True).sqrt()


@check("flatten", "power 2.5, norms a head, eps 0.1, causal and not == the matrix", below=1e-9, control="norms over all heads")
def _() -> tuple[float, float]:
    q, k, v = qkv(20, 8)
    a = torch.randn(2, 8, dtype=F64)
    own: list[float] = []
    other: list[float] = []
    for causal in (False, True):
        out = attend(q, k, v, get("flatten", power=2.5, norm="head", eps=0.1), mask=Causal() if causal else None, sharpness=a)
        count = torch.arange(1, 21, dtype=F64)[:, None] if causal else 20
        for dims, to in (((-1,), own), ((1, 3), other)):
            w = focus(q, a, 2.5, dims) @ focus(k, a, 2.5, dims).mT
            w = w.tril() if causal else w
            to.append(naive.gap(out, w / (w.sum(-1, keepdim=True) + 0.1 * count) @ v))
    return max(own), min(other)


@check(
    "flatten",
    "the layer: positions on keys, learned sharpness, one convolution of v for all heads == by hand",
    below=1e-9,
    control="convolution of the output",
)
def _() -> tuple[float, float]:
    layer, x = drawn(GridAttention(16, 2, (5, 6), "flatten")), torch.randn(2, 30, 16, dtype=F64)
    assert layer.key_position is not None
    q, k, v = layer.qkv(x).chunk(3, -1)
    q, k, v = (split(y, 2) for y in (q, k + layer.key_position, v))
    fq, fk = (focus(y, layer.inputs.learned["sharpness"], 3.0, (1, 3)) for y in (q, k))
    o = fq @ fk.mT @ v / ((fq @ fk.mT).sum(-1, keepdim=True) + 30e-6)
    y = layer(x)
    return naive.gap(y, around(layer, o, v, x, shared=True)), naive.gap(y, around(layer, o, o, x, shared=True))
