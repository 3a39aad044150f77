"""Checks of linear attention for images: MALA, NaLaFormer, InLine, RALA."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import FeatureMap, Recurrent, bind, elu_plus_one
from ...catalog import get
from ...engine import attend, weights
from ...mechanisms.recurrent.mala import magnitude_aware, scaled_elu
from ...nn import GridAttention
from .. import naive
from ..verification import check
from .comparing import F64, gap_with_gradients
from .weighted import qkv


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(x))


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


def turned(x: Tensor, width: int) -> Tensor:
    """Two-dimensional rotary as complex numbers, a token and a pair of channels at a time."""
    n, d = x.shape[-2:]
    out = x.clone()
    for t in range(n):
        for pair in range(d // 2):
            quarter = d // 4
            at, rate = (t // width, pair) if pair < quarter else (t % width, pair - quarter)
            angle = at * 10000 ** -(rate / max(quarter - 1, 1))
            z = torch.complex(x[..., t, 2 * pair], x[..., t, 2 * pair + 1]) * complex(math.cos(angle), math.sin(angle))
            out[..., t, 2 * pair], out[..., t, 2 * pair + 1] = z.real, z.imag
    return out


@check(
    "mala",
    "the layer on a 5 x 6 grid: rotary in the numerator alone, convolution of v, gate == loops",
    below=1e-10,
    control="z from turned features",
)
def _() -> tuple[float, float]:
    layer = GridAttention(16, 2, (5, 6), "mala").double()
    x = torch.randn(2, 30, 16, dtype=F64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    fq, fk = 8**-0.5 * elu(q), elu(k)
    tq, tk = turned(fq, 6), turned(fk, 6)
    assert layer.local is not None and layer.gate is not None
    plane = v.permute(0, 1, 3, 2).reshape(2, 16, 5, 6)
    local = F.conv2d(plane, layer.local.weight, layer.local.bias, padding=2, groups=16).flatten(2).mT

    def truth(zq: Tensor, zk: Tensor) -> Tensor:
        z = (zq @ zk.mT).mean(-1, keepdim=True)
        o = (1 + 1 / (z + 1e-6)) * (tq @ tk.mT) @ v / 30 - z * v.mean(-2, keepdim=True)
        return layer.out((o.transpose(1, 2).flatten(-2) + local) * layer.gate(x))  # type: ignore[misc]

    y = layer(x)
    return naive.gap(y, truth(fq, fk)), naive.gap(y, truth(tq, tk))


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


@check("inline-attention", "linear path with gradients == its matrix, whose rows sum to 1", below=1e-10, control="without the + 1/N")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(49, 16))
    s = 16**-0.5 / 49 * q @ k.mT
    w = s - s.mean(-1, keepdim=True) + 1 / 49
    out = attend(q, k, v, "inline-attention")
    rows = naive.gap(weights(q, k, "inline-attention").sum(-1), torch.ones(1, 2, 49))  # type: ignore[union-attr]
    return max(gap_with_gradients(out, w @ v, leaves), rows), naive.gap(out, (w - 1 / 49) @ v)


@check("inline-attention", "weights of q and of 3q differ", above=0.05, control="ReLU linear attention")
def _() -> tuple[float, float]:
    q, k, _ = qkv(49, 16)
    found = [naive.gap(weights(q, k, m), weights(3 * q, k, m)) for m in (get("inline-attention", feature="relu"), get("slab", eps=0.0))]  # type: ignore[arg-type]
    return found[0], found[1]


@check(
    "inline-attention",
    "1000 pairs of queries: least distance of rows over distance of queries",
    above=1e-4,
    control="ReLU linear attention, with q and 2q among the pairs",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(1000, 16)
    other = torch.randn(1, 2, 1000, 16, dtype=F64)
    other[:, :, 0] = 2 * q[:, :, 0]

    def least(name: str) -> float:
        apart = (weights(q, k[:, :, :49], name) - weights(other, k[:, :, :49], name)).norm(dim=-1)  # type: ignore[operator]
        return float((apart / (q - other).norm(dim=-1)).min())

    return least("inline-attention"), least("slab")


@check(
    "inline-attention",
    "the layer with a class token: convolution by each sample's own kernels == unfolded patches",
    below=1e-10,
    control="kernels of the other sample",
)
def _() -> tuple[float, float]:
    layer = GridAttention(16, 2, (4, 5), "inline-attention", cls=True).double()
    x = torch.randn(2, 21, 16, dtype=F64)
    v = layer.qkv(x)[..., 32:]
    assert layer.dynamic is not None
    kernels = layer.dynamic.kernels(x)
    patches = F.unfold(v[:, 1:].mT.unflatten(-1, (4, 5)), 3, padding=1).unflatten(1, (16, 9))

    def local(kernels: Tensor) -> Tensor:
        return F.pad(torch.einsum("bckn,bck->bnc", patches, kernels.flatten(2)), (0, 0, 1, 0))

    bare = copy.deepcopy(layer)
    bare.dynamic = None
    bare.out, identity = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
    whole = copy.deepcopy(layer)
    whole.out = identity  # type: ignore[assignment]
    found = whole(x) - bare(x)
    return naive.gap(found, local(kernels)), naive.gap(found, local(kernels.flip(0)))


@check("rala", "linear path with gradients == phi(q).alpha phi(k) over its row sums", below=1e-10, control="every token equally relevant")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(50, 16))
    fq, fk = elu(q), elu(k)
    alpha = torch.softmax(16**-0.5 * (fk * fq.mean(-2, keepdim=True)).sum(-1), -1)[..., None]

    def truth(alpha: Tensor) -> Tensor:
        w = fq @ (alpha * fk).mT
        return w / 50 / (w.mean(-1, keepdim=True) + 1e-6) @ v

    out = attend(q, k, v, "rala")
    return gap_with_gradients(out, truth(50 * alpha), leaves), naive.gap(out, truth(torch.ones_like(alpha)))


@check("rala", "q of no relevance (phi(q) = 0 on average): plain elu + 1 attention", below=1e-5, control="the same with relevance")
def _() -> tuple[float, float]:
    q, k, v = qkv(50, 16)
    fk = elu(k)

    def miss(q: Tensor) -> float:
        w = elu(q) @ fk.mT
        return naive.gap(attend(q, k, v, get("rala", eps=0.0)), w / w.sum(-1, keepdim=True) @ v)

    return miss(q - 15), miss(q)


@check("rala", "v of rank 4: rank of outputs after the gate", above=16, control="before it")
def _() -> tuple[float, float]:
    q, k, _ = qkv(196, 16)
    v = torch.randn(1, 2, 196, 4, dtype=F64) @ torch.randn(1, 2, 4, 16, dtype=F64)
    o = attend(q, k, v, "rala")[0, 0]
    gate = torch.randn(196, 16, dtype=F64) @ torch.randn(16, 16, dtype=F64)
    return int(torch.linalg.matrix_rank(o * gate)), int(torch.linalg.matrix_rank(o))
