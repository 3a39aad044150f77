"""Checks of longvq."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.codes import dense, nearest
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, misshapen
from regard.lab.checks.shared.mega import ema_loop
from regard.lab.verification import check
from regard.nn.codes import normed
from regard.zoo.linear.longvq import LongVQBlock


def longvq_truth(layer: LongVQBlock, x: Tensor, exact: bool = False) -> Tensor:
    """The block from its formulas with a dense matrix; exact: over the keys themselves."""
    n = layer.norm(x)
    y = ema_loop(layer.ema, n)
    y = y if layer.causal else y + ema_loop(layer.ema, n.flip(1), 1).flip(1)
    m = F.silu(y + layer.ema.omega * n)
    u, z, r, hx = layer.m(m).split([layer.dim, layer.zdim, layer.hdim, layer.dim], -1)
    q, k = (normed(layer.kappa[at] * F.silu(z) + layer.mu[at])[:, None] for at in (0, 1))
    v = F.silu(layer.v(n))[:, None]
    hat = k if exact else nearest(k, layer.codebook.codes)
    o = dense(q, hat, v, None if layer.offsets is None else layer.offsets[None], layer.causal)
    return x + torch.sigmoid(u) * (F.silu(hx + layer.h(F.silu(r) * o[:, 0])) - x)


@check(
    "longvq",
    "both directions (9 codes, N = 100) and causal with a window of biases, by blocks and by steps == dense formulas",
    below=1e-9,
    control="over unquantised keys",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for causal in (False, True):
        layer = LongVQBlock(12, codes=9, zdim=6, ndim=4, window=8, causal=causal).double().eval()
        if layer.offsets is not None:
            layer.offsets.data.normal_()
        x = torch.randn(1, 100, 12, dtype=F64)
        y = layer(x)
        own.append(naive.gap(y, longvq_truth(layer, x)))
        other = min(other, naive.gap(y, longvq_truth(layer, x, exact=True)))
        if causal:
            first, state = layer.step(x[:, :30])
            own.append(naive.gap(torch.cat((first, layer.step(x[:, 30:], state)[0]), 1), y))
    return max(own), other


@check("longvq", "as many codes as tokens: softmax attention over the keys themselves", below=1e-9, control="9 codes")
def _() -> tuple[float, float]:
    found = []
    for codes in (30, 9):
        layer, x = LongVQBlock(12, codes=codes, zdim=6, ndim=4, window=8).double().eval(), torch.randn(1, 30, 12, dtype=F64)
        n = layer.norm(x)
        k = layer.parts(n, layer.ema(n))[4]
        layer.codebook.codes.copy_(k[0, :, :codes].detach())
        found.append(naive.gap(layer(x), longvq_truth(layer, x, exact=True)))
    return found[0], found[1]


@check("longvq", "update gate closed: the block returns x", below=1e-12, control="half open")
def _() -> tuple[float, float]:
    layer, x = LongVQBlock(12, codes=9, zdim=6, ndim=4, window=8).double().eval(), torch.randn(1, 30, 12, dtype=F64)
    found = []
    for bias in (-1e4, 0.0):
        layer.m.weight.data[: layer.dim] = 0
        layer.m.bias.data[: layer.dim] = bias
        found.append(naive.gap(layer(x), x))
    return found[0], found[1]


@check("longvq", "training moves the codebook to its keys: mean squared distance after over before", below=0.5, control="in eval")
def _() -> tuple[float, float]:
    def ratio(training: bool) -> float:
        torch.manual_seed(0)
        layer, x = LongVQBlock(12, codes=16, zdim=6, ndim=4, window=8), torch.randn(8, 64, 12)
        layer.train(training)
        layer(x)
        before = float(layer.commitment.detach())
        for _ in range(150):
            layer(x)
        return float(layer.commitment.detach()) / before

    return ratio(True), ratio(False)


@check(
    "longvq",
    "every parameter moved: the block == its formulas; what its projections are named for, and the commitment, by hand",
    below=1e-9,
    control="an ungated unit",
)
def _() -> tuple[float, float]:
    layer, x = drawn(LongVQBlock(12, codes=9, zdim=6, hdim=10, ndim=4, window=5, block=8)).eval(), torch.randn(2, 40, 12, dtype=F64)
    shapes: dict[str, tuple[int, ...]] = {
        "norm.weight": (12,),
        "v.weight": (10, 12),
        "v.bias": (10,),
        "m.weight": (40, 12),
        "m.bias": (40,),
    }
    shapes |= {f"ema.{name}": (1, 12, 4) for name in ("delta", "alpha", "beta", "gamma")} | {"ema.omega": (12,), "offsets": (5,)}
    bad = misshapen(layer, shapes | {"h.weight": (12, 10), "kappa": (2, 6), "mu": (2, 6)})
    y, truth = layer(x), longvq_truth(layer, x)
    n = layer.norm(x)
    made = layer.m(F.silu(ema_loop(layer.ema, n) + layer.ema.omega * n))
    u, z = torch.sigmoid(made[..., :12]), F.silu(made[..., 12:18])
    k = normed(layer.kappa[1] * z + layer.mu[1])[:, None]
    far = (k - nearest(k, layer.codebook.codes)).square().sum((1, 3)).mean()
    first, state = layer.step(x[:, :11])
    stepped = torch.cat((first, layer.step(x[:, 11:], state)[0]), 1)
    return max(bad, naive.gap(y, truth), naive.gap(stepped, y), naive.gap(layer.commitment, far)), naive.gap(y, x + (truth - x) / u)
