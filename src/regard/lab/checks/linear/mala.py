"""Checks of mala."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regard.algebra import Causal, FeatureMap, Recurrent, bind, elu_plus_one
from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.grids import around, elu, turned
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.images.grid import GridAttention
from regard.zoo.linear.mala import magnitude_aware, scaled_elu


def scaled(x: Tensor, factor: float) -> Tensor:
    return factor * scaled_elu(x)


@check("mala", "linear path with gradients == its matrix written out, whose rows sum to 1", below=1e-10, control="sums in place of means")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(64, 16))
    s = 16**-0.5 * elu(q) @ elu(k).mT

    def matrix(z: Tensor) -> Tensor:
        return (1 + 1 / z) * s / 64 - z / 64

    w = matrix(s.mean(-1, keepdim=True))
    out = attend(q, k, v, get("mala", eps=0.0))
    rows = naive.gap(weights(q, k, get("mala", eps=0.0)).sum(-1), torch.ones(1, 2, 64))  # type: ignore[union-attr]
    return max(gap_with_gradients(out, w @ v, leaves), rows), naive.gap(out, matrix(s.sum(-1, keepdim=True)) @ v)


@check("mala", "phi(q) times 8: mean deviation inside rows grows", above=5, control="elu + 1 divided by its sum")
def _() -> tuple[float, float]:
    q, k, _v = qkv(64, 16)

    def spread(mechanism: Recurrent, c: float) -> float:
        changed = replace(mechanism, feature=FeatureMap(bind(scaled, factor=c), elu_plus_one))
        return float(weights(q, k, changed).std(-1).mean())  # type: ignore[union-attr]

    plain = Recurrent(FeatureMap(scaled_elu, elu_plus_one), readout="sum", eps=0.0, scaled=False)
    mala = Recurrent(FeatureMap(scaled_elu, elu_plus_one), readout=bind(magnitude_aware, eps=0.0), scaled=False)
    return spread(mala, 8) / spread(mala, 1), spread(plain, 8) / spread(plain, 1)


@check(
    "mala",
    "the layer on a 5 x 6 grid: rotary in the numerator alone, convolution of v, gate == loops",
    below=1e-10,
    control="z from turned features",
)
def _() -> tuple[float, float]:
    layer = drawn(GridAttention(16, 2, (5, 6), "mala"))
    x = torch.randn(2, 30, 16, dtype=F64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    fq, fk = 8**-0.5 * elu(q), elu(k)
    tq, tk = turned(fq, 6), turned(fk, 6)

    def truth(zq: Tensor, zk: Tensor) -> Tensor:
        z = (zq @ zk.mT).mean(-1, keepdim=True)
        return around(layer, (1 + 1 / (z + 1e-6)) * (tq @ tk.mT) @ v / 30 - z * v.mean(-2, keepdim=True), v, x, gate="linear")

    y, plane = layer(x), layer(x.mT.unflatten(-1, (5, 6))).flatten(2).mT
    return max(naive.gap(y, truth(fq, fk)), naive.gap(plane, y)), naive.gap(y, truth(tq, tk))


@check(
    "mala", "under a causal mask sums and counts run up to each token, in chunks and streams", below=1e-10, control="sums over all tokens"
)
def _() -> tuple[float, float]:
    q, k, v = qkv(24, 16)
    s, rows = 16**-0.5 * elu(q) @ elu(k).mT, []
    for t in range(24):
        z = s[:, :, t, : t + 1].mean(-1, keepdim=True)
        w = (1 + 1 / (z + 1e-6)) * s[:, :, t, : t + 1] / (t + 1) - z / (t + 1)
        rows.append(w[:, :, None] @ v[:, :, : t + 1])
    truth = torch.cat(rows, 2)
    own = max(naive.gap(attend(q, k, v, "mala", mask=Causal()), truth), naive.gap(streamed("mala", q, k, v, (1, 2, 20)), truth))
    return own, naive.gap(attend(q, k, v, "mala"), truth)
