"""Checks of inline-attention."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.grid import GridAttention


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
