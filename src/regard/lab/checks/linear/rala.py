"""Checks of rala."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from regard.algebra import Padding
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.grids import around, elu, turned
from regard.lab.checks.shared.layers import drawn, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.images.grid import Dress, GridAttention


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


@check("rala", "v of rank 4 a head: rank of what the layer gives its last projection", above=16, control="without its gate")
def _() -> tuple[float, float]:
    layer = GridAttention(32, 2, (14, 14), "rala", dress=Dress(gate="linear")).double()
    layer.out = torch.nn.Identity()  # type: ignore[assignment]
    bare = copy.deepcopy(layer)
    bare.gate = None
    with torch.no_grad():
        for one in (layer, bare):
            one.qkv.bias.zero_()
            one.qkv.weight[64:80] = one.qkv.weight[64:68].repeat(4, 1)  # the 16 channels of the first head's v are four
    x = torch.randn(1, 196, 32, dtype=F64)
    found = [int(torch.linalg.matrix_rank(one(x)[0, :, :16])) for one in (layer, bare)]
    return found[0], found[1]


def relevances(fq: Tensor, fk: Tensor) -> Tensor:
    """alpha_j, summing to the number of tokens."""
    return fk.shape[-2] * torch.softmax(fk.shape[-1] ** -0.5 * (fk * fq.mean(-2, keepdim=True)).sum(-1), -1)[..., None]


@check(
    "rala",
    "the layer on a 5 x 6 grid == loops: rotary in the numerator alone, convolution of v, linear gate",
    below=1e-10,
    control="relevance from turned features",
)
def _() -> tuple[float, float]:
    layer, x = drawn(GridAttention(16, 2, (5, 6), "rala")), torch.randn(2, 30, 16, dtype=F64)
    q, k, v = (split(y, 2) for y in layer.qkv(x).chunk(3, -1))
    fq, fk = elu(q), elu(k)

    def truth(alpha: Tensor) -> Tensor:
        o = turned(fq, 6) @ turned(alpha * fk, 6).mT @ v / 30 / ((fq @ (alpha * fk).mT).mean(-1, keepdim=True) + 1e-6)
        return around(layer, o, v, x, gate="linear")

    y = layer(x)
    return naive.gap(y, truth(relevances(fq, fk))), naive.gap(y, truth(relevances(turned(fq, 6), turned(fk, 6))))


@check("rala", "padding: outputs at the real tokens are those without it", below=1e-10, control="padding counted in the mean query")
def _() -> tuple[float, float]:
    q, k, v = qkv(24, 8)
    junk = [torch.cat((x, 5 * torch.randn(1, 2, 7, 8, dtype=F64)), 2) for x in (q, k, v)]
    out = attend(*junk, "rala", mask=Padding(), keep=(torch.arange(31) < 24)[None])[:, :, :24]  # type: ignore[misc]
    fq, fk = elu(q), elu(k)

    def truth(queries: Tensor) -> Tensor:
        w = fq @ (relevances(elu(queries), fk) * fk).mT
        return w / 24 / (w.mean(-1, keepdim=True) + 1e-6) @ v

    return naive.gap(out, truth(q)), naive.gap(out, truth(junk[0]))
