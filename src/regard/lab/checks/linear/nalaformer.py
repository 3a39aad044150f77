"""Checks of nalaformer."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.grids import around, turned
from regard.lab.checks.shared.layers import drawn, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.images.grid import GridAttention


def norm_aware_weights(q: Tensor, k: Tensor, power: float | None = None, source: str = "q") -> Tensor:
    """NaLaFormer's row-normalised weights, feature by feature."""
    norm = q.square().sum(-1, keepdim=True).sqrt()
    p = 3 * (0.5 + torch.tanh(norm)) if power is None else torch.full_like(norm, power)
    fq = torch.cat(((q / norm).clamp_min(0).pow(p), (-q / norm).clamp_min(0).pow(p)), -1)
    fk = torch.cat(((k**3).clamp_min(0), (-(k**3)).clamp_min(0)), -1)
    w = fq @ fk.mT
    return w / w.sum(-1, keepdim=True)


@check("nalaformer", "linear path with gradients == its matrix written out", below=1e-8, control="power 3 for every query")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(64, 16))
    out = attend(q, k, v, get("nalaformer", eps=0.0))
    return gap_with_gradients(out, norm_aware_weights(q, k) @ v, leaves), naive.gap(out, norm_aware_weights(q, k, 3.0) @ v)


@check("nalaformer", "mean entropy of rows falls from |q| x 0.05 to x 1, in nats", above=0.3, control="ReLU linear attention")
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, 16)

    def drop(mechanism: str) -> float:
        h = [float(-torch.special.xlogy(w, w).sum(-1).mean()) for w in (weights(c * q, k, mechanism) for c in (0.05, 0.2, 0.5, 1.0))]  # type: ignore[arg-type]
        falling = all(a > b for a, b in itertools.pairwise(h))
        return h[0] - h[-1] if falling else 0.0

    return drop("nalaformer"), drop("slab")


@check("nalaformer", "keys of opposite signs in every channel: unnormalised scores", below=0, control="keys of the same signs")
def _() -> tuple[float, float]:
    q, k, _ = qkv(20, 16)
    mechanism = replace(get("nalaformer"), readout="none")  # type: ignore[type-var]
    found = [float(weights(q, sign * q.sign() * k.abs(), mechanism).diagonal(dim1=-2, dim2=-1).abs().max()) for sign in (-1, 1)]  # type: ignore[union-attr]
    return found[0], found[1]


@check(
    "nalaformer",
    "power, offset and an odd power of the keys as given == their matrix; causal and streamed too",
    below=1e-9,
    control="the defaults",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(20, 8)
    mechanism = get("nalaformer", power=2.0, offset=0.7, key_power=5, eps=0.01)
    norm = q.square().sum(-1, keepdim=True).sqrt()
    p = 2 * (0.7 + torch.tanh(norm))
    w = sum((s * q / norm).clamp_min(0).pow(p) @ (s * k**5).clamp_min(0).mT for s in (1, -1))
    past = w.tril()  # type: ignore[union-attr]
    count = torch.arange(1, 21, dtype=F64)[:, None]
    truth = w / (w.sum(-1, keepdim=True) + 20 * 0.01) @ v  # type: ignore[union-attr, operator]
    causal = past / (past.sum(-1, keepdim=True) + count * 0.01) @ v
    gaps = [naive.gap(attend(q, k, v, mechanism), truth), naive.gap(attend(q, k, v, mechanism, mask=Causal()), causal)]
    gaps.append(naive.gap(streamed(mechanism, q, k, v, (1, 2, 15)), causal))
    return max(gaps), naive.gap(attend(q, k, v, get("nalaformer")), truth)


@check(
    "nalaformer",
    "the layer on a 5 x 6 grid == loops: both halves turned in the numerator alone, convolution of v, LayerNorm, silu gate",
    below=1e-9,
    control="without the norm",
)
def _() -> tuple[float, float]:
    layer, x = drawn(GridAttention(16, 2, (5, 6), "nalaformer")), torch.randn(2, 30, 16, dtype=F64)
    q, k, v = (split(y, 2) for y in layer.qkv(x).chunk(3, -1))
    norm = q.square().sum(-1, keepdim=True).sqrt()
    p = 3 * (0.5 + torch.tanh(norm))
    halves = [((s * q / norm).clamp_min(0).pow(p), (s * k**3).clamp_min(0)) for s in (1, -1)]
    w = sum(turned(a, 6) @ turned(b, 6).mT for a, b in halves)
    mass = sum((a @ b.mT).mean(-1, keepdim=True) for a, b in halves)
    o = w @ v / 30 / (mass + 1e-6)  # type: ignore[operator]
    y = layer(x)
    return naive.gap(y, around(layer, o, v, x, norm=True, gate="silu")), naive.gap(y, around(layer, o, v, x, gate="silu"))


@check(
    "nalaformer",
    "a zero query and a zero key: outputs and gradients are finite, the query's output is zero",
    below=0,
    control="a query of 1e-3",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(6, 8)

    def size(x: float) -> float:
        leaves = q.clone(), k.clone(), v.clone()
        leaves[0][:, :, 2], leaves[1][:, :, 4] = x, 0.0
        leaves = tuple(y.requires_grad_() for y in leaves)  # type: ignore[assignment]
        out = attend(*leaves, "nalaformer")
        finite = all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.square().sum(), leaves))
        return float(out[:, :, 2].detach().abs().max()) if finite else math.nan

    return size(0.0), size(1e-3)
