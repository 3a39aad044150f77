"""Checks of efficient-attention."""

from __future__ import annotations

import torch

from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.errors import RegardError
from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
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


@check("efficient-attention", "the block at 128 x 128: largest tensor over N^2", below=0.25, control="the matrix written out at 64 x 64")
def _() -> tuple[float, float]:
    block = EfficientAttention(8, 16, 2, 16)
    maps = block.maps(torch.randn(1, 8, 6, 7))
    if naive.gap(maps.sum((-1, -2)), torch.ones(1, 2, 8)) > 1e-5:
        raise RegardError("maps do not sum to one")
    big, small = torch.randn(1, 8, 128, 128), torch.randn(1, 8, 64, 64)
    q, k = block.tokens(block.q(small)), block.tokens(block.k(small))
    return largest_tensor(lambda: block(big)) / 128**4, largest_tensor(lambda: weights(q, k, "efficient-attention")) / 64**4
