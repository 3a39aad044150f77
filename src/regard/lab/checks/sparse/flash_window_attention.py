"""Checks of flash-window-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.flash_window_attention import SwinWindowAttention, region_mask, window_attention


@check(
    "flash-window-attention",
    "L 9 to 64, D 16 to 128, bias and shift mask: out and dq, dk, dv, dbias equal plain attention",
    below=1e-10,
    control="the bias left out",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for length, dim, shifted in ((9, 16, True), (16, 32, False), (49, 32, True), (64, 128, False)):
        q, k, v = (torch.randn(8, 2, length, dim, dtype=F64, requires_grad=True) for _ in range(3))
        bias = torch.randn(2, length, length, dtype=F64, requires_grad=True)
        side = math.isqrt(length)
        mask = region_mask(2 * side, 2 * side, side, side // 2).double() if shifted else None
        seed = torch.randn_like(q)
        s = q @ k.transpose(-1, -2) * dim**-0.5
        extra = 0.0 if mask is None else mask.repeat(2, 1, 1)[:, None]
        truth, plain = ((s + b + extra).softmax(-1) @ v for b in (bias, 0.0))
        grads = torch.autograd.grad((truth * seed).sum(), (q, k, v, bias), retain_graph=True)
        outs = [window_attention(q, k, v, bias, mask, chunk=chunk) for chunk in (8, 16, dim)]
        mine = torch.autograd.grad((outs[0] * seed).sum(), (q, k, v, bias))
        own = max(own, *(naive.gap(out, truth) for out in outs), *(naive.gap(a, b) for a, b in zip(mine, grads, strict=True)))
        other = max(other, naive.gap(plain, truth))
    return own, other


@check(
    "flash-window-attention",
    "a shifted layer equals dense attention over the map under window and region masks",
    below=1e-10,
    control="the region mask left out",
)
def _() -> tuple[float, float]:
    layer, x = SwinWindowAttention(16, 2, 4, 2).double(), torch.randn(2, 8, 12, 16, dtype=F64)
    at = torch.arange(96)
    y, z = (at // 12 - 2) % 8, (at % 12 - 2) % 12  # places after the roll
    window = (y // 4 == y[:, None] // 4) & (z // 4 == z[:, None] // 4)
    near = ((at // 12)[:, None] - at // 12).abs() < 4
    region = near & (((at % 12)[:, None] - at % 12).abs() < 4)
    index = (y[:, None] % 4 - y % 4 + 3) * 7 + z[:, None] % 4 - z % 4 + 3
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)

    def dense(mask: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 8**-0.5 + layer.table[index].permute(2, 0, 1)
        return layer.out((s.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(-2)).unflatten(1, (8, 12))  # type: ignore[no-any-return]

    out = layer(x)
    layer.flash = False
    return max(naive.gap(out, dense(window & region)), naive.gap(out, layer(x))), naive.gap(out, dense(window))


@check("flash-window-attention", "tensors of L x L kept for the backward pass, beside the bias", below=0, control="the plain path")
def _() -> tuple[float, float]:
    def kept(flash: bool) -> float:
        layer, found = SwinWindowAttention(16, 2, 7, flash=flash), 0

        def look(x: Tensor) -> Tensor:
            nonlocal found
            found += x.dim() == 4 and x.shape[-2:] == (49, 49)
            return x

        with torch.autograd.graph.saved_tensors_hooks(look, lambda x: x):
            layer(torch.randn(1, 14, 14, 16))
        return float(found)

    return kept(True), kept(False)
