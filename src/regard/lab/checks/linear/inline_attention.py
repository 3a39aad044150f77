"""Checks of inline-attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.grids import elu
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.images.grid import GridAttention
from regard.zoo.linear.inline_attention import injectivity


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

    keys = k[:, :, :49]
    rows = [weights(x, keys, "inline-attention") for x in (q, other)]
    assert rows[0] is not None and rows[1] is not None
    ratios = [float((rows[0][0, h, i] - rows[1][0, h, i]).norm() / (q - other)[0, h, i].norm()) for h in range(2) for i in range(1000)]
    own, collapsed = (injectivity(name, q, other, keys) for name in ("inline-attention", "slab"))
    return own if abs(own - min(ratios)) < 1e-12 else math.nan, collapsed


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


@check(
    "inline-attention",
    "other features and temperatures, both directions and causal == the matrix written out",
    below=1e-10,
    control="the temperature left out",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(20, 8)
    own, other = [], math.inf
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda x: x,
        "relu": lambda x: x.clamp_min(0),
        "elu+1": elu,
        "exp": torch.exp,
    }

    def matrix(name: str, t: float, causal: bool) -> Tensor:
        s = 8**-0.5 * maps[name](t * q) @ maps[name](t * k).mT
        past = torch.ones(20, 20, dtype=F64).tril() if causal else torch.ones(20, 20, dtype=F64)
        n = past.sum(-1, keepdim=True)
        return past * (s / n - (s * past).sum(-1, keepdim=True) / n**2 + 1 / n)

    for name in maps:
        for t, given in ((0.2 if name == "exp" else 1.0, None), (0.7, 0.7)):
            for causal in (False, True):
                out = attend(q, k, v, get("inline-attention", feature=name, temperature=given), mask=Causal() if causal else None)
                own.append(naive.gap(out, matrix(name, t, causal) @ v))
                if given:
                    other = min(other, naive.gap(out, matrix(name, 1.0, causal) @ v))
    return max(own), other


@check(
    "inline-attention",
    "the layer == the matrix, projections and kernels made of the mean token by two grouped maps, by hand",
    below=1e-10,
    control="without the local residual",
)
def _() -> tuple[float, float]:
    layer, x = drawn(GridAttention(16, 2, (4, 5), "inline-attention")), torch.randn(2, 20, 16, dtype=F64)
    q, k, v = (split(y, 2) for y in layer.qkv(x).chunk(3, -1))
    s = q @ k.mT * 8**-0.5 / 20
    o = joined((s - s.mean(-1, keepdim=True) + 1 / 20) @ v)
    assert layer.dynamic is not None
    first, last = layer.dynamic.first, layer.dynamic.last
    assert first.bias is not None and last.bias is not None
    made = []
    for h in range(2):
        rows = slice(8 * h, 8 * h + 8)
        z = x.mean(1)[:, rows] @ first.weight[rows, :, 0].T + first.bias[rows]
        z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
        made.append(z @ last.weight[72 * h : 72 * h + 72, :, 0].T + last.bias[72 * h : 72 * h + 72])
    kernels = torch.cat(made, -1).view(2, 16, 9)
    patches = F.unfold(joined(v).mT.unflatten(-1, (4, 5)), 3, padding=1).unflatten(1, (16, 9))
    local = torch.einsum("bckn,bck->bnc", patches, kernels)
    return naive.gap(layer(x), layer.out(o + local)), naive.gap(layer(x), layer.out(o))
