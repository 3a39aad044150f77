"""Checks of efficient-attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.zoo.linear.efficient_attention import EfficientAttention


@check(
    "efficient-attention",
    "softmax form with gradients == softmax_d(q) softmax_n(k)^T v, whose rows sum to 1",
    below=1e-10,
    control="the axes swapped",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(30))
    w = torch.softmax(q, -1) @ torch.softmax(k, -2).mT
    other = torch.softmax(q, -2) @ torch.softmax(k, -1).mT
    out = attend(q, k, v, "efficient-attention")
    rows = naive.gap(weights(q, k, "efficient-attention").sum(-1), torch.ones(1, 2, 30))  # type: ignore[union-attr]
    return max(gap_with_gradients(out, w @ v, leaves), rows), naive.gap(out, other @ v)


@check("efficient-attention", "scaling form == dot-product attention over N, exactly", below=1e-12, control="the softmax form")
def _() -> tuple[float, float]:
    q, k, v = qkv(30)
    truth = q @ k.mT @ v / 30
    found = [naive.gap(attend(q, k, v, get("efficient-attention", norm=norm)), truth) for norm in ("scaling", "softmax")]
    return found[0], found[1]


@check(
    "efficient-attention",
    "causal: chunks and steps == the softmax over positions up to each token",
    below=1e-10,
    control="over all positions",
)
def _() -> tuple[float, float]:
    from regard.algebra import Causal

    q, k, v = qkv(150)
    truth = torch.stack(
        [torch.softmax(q[:, :, t], -1)[:, :, None] @ torch.softmax(k[:, :, : t + 1], -2).mT @ v[:, :, : t + 1] for t in range(150)], 2
    )
    found = [attend(q, k, v, "efficient-attention", mask=Causal(), executor=e) for e in ("chunk", "step")]
    whole = attend(q, k, v, "efficient-attention")
    return max(naive.gap(x, truth[:, :, :, 0]) for x in found), naive.gap(whole, truth[:, :, :, 0])


@check("efficient-attention", "the block at 64 x 64: largest tensor over N^2", below=0.25, control="the matrix written out at 32 x 32")
def _() -> tuple[float, float]:
    block = EfficientAttention(8, 16, 2, 16)
    big, small = torch.randn(1, 8, 64, 64), torch.randn(1, 8, 32, 32)
    q, k = block.tokens(block.q(small)), block.tokens(block.k(small))
    return largest_tensor(lambda: block(big)) / 64**4, largest_tensor(lambda: weights(q, k, "efficient-attention")) / 32**4


@check(
    "efficient-attention",
    "the block, both norms == x + W_o of the heads by hand; its maps are softmaxes over positions",
    below=1e-10,
    control="without the residual",
)
def _() -> tuple[float, float]:
    x, own, other = torch.randn(2, 6, 4, 5, dtype=F64), [], math.inf
    for norm in ("softmax", "scaling"):
        block = drawn(EfficientAttention(6, 8, 2, 12, norm))
        pixels = x.flatten(2).mT
        q, k, v = (split(F.linear(pixels, y.weight[..., 0, 0], y.bias), 2) for y in (block.q, block.k, block.v))
        if norm == "softmax":
            o = (torch.exp(q) / torch.exp(q).sum(-1, keepdim=True)) @ ((torch.exp(k) / torch.exp(k).sum(-2, keepdim=True)).mT @ v)
            looks = (torch.exp(k) / torch.exp(k).sum(-2, keepdim=True)).mT.unflatten(-1, (4, 5))
            own.append(naive.gap(block.maps(x), looks))
        else:
            o = q @ (k.mT @ v) / 20
        y = F.linear(joined(o), block.out.weight[..., 0, 0], block.out.bias).mT.unflatten(-1, (4, 5))
        own.append(naive.gap(block(x), x + y))
        other = min(other, naive.gap(block(x), y))
    return max(own), other
