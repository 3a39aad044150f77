"""Tensors of two values, learned straight through: one-bit weights and activations with learned scales, and their products on packed bits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 1e-5  # of a scale


class Signed(torch.autograd.Function):
    """a sign(x); gradients reach x where |x| <= a, and a as sum(sign(x) grad) / sqrt(entries)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        scale = scale.clamp_min(LEAST)
        ctx.save_for_backward(x, scale)
        return x.sign() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * ((x / scale).abs() <= 1), (x.sign() * grad).sum() / math.sqrt(x.numel())


class Unsigned(torch.autograd.Function):
    """a clamp(round(x / a), 0, 1); gradients reach x where 0 <= x / a <= 1, and a as LSQ's, over sqrt(entries)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        scale = scale.clamp_min(LEAST)
        ctx.save_for_backward(x, scale)
        return (x / scale).round().clamp(0, 1) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        y = x / scale
        inside = (y >= 0) & (y <= 1)
        slope = torch.where(inside, y.round() - y, (y > 1).to(y.dtype))
        return grad * inside, (slope * grad).sum() / math.sqrt(x.numel())


class Binarizer(nn.Module):
    """x -> a sign(x), or for signed=False a clamp(round(x / a), 0, 1). a is learned, at least 1e-5; of the first tensor it is 2 (signed) or 4 mean |x|."""

    def __init__(self, signed: bool = True):
        super().__init__()
        self.signed = signed
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if not bool(self.fitted) and float(self.scale.detach()) == 1.0 and x.numel():
            with torch.no_grad():
                self.scale.copy_((2 if self.signed else 4) * x.abs().mean())
                self.fitted.fill_(True)  # type: ignore[operator]
        return (Signed if self.signed else Unsigned).apply(x, self.scale.to(x.dtype))  # type: ignore[no-any-return, no-untyped-call]


def binary_weight(weight: Tensor) -> Tensor:
    """mean |W| sign(W - mean W), with the gradients of W itself."""
    w = weight.detach()
    return weight + (w.abs().mean() * (w - w.mean()).sign() - w)


class BinaryLinear(nn.Linear):
    """(..., in) -> (..., out): a binary weight on a binarised input, which a learned `shift` (in,) moves first; bias in full precision."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.shift, self.binarize = nn.Parameter(torch.zeros(inputs)), Binarizer()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.binarize(x + self.shift), binary_weight(self.weight), self.bias)


def packed(x: Tensor) -> Tensor:
    """Signs of x (..., n), n <= 63 a word: bits (..., words) int64, 1 for plus."""
    x = F.pad(x, (0, -x.shape[-1] % 63), value=-1.0).unflatten(-1, (-1, 63))
    return ((x > 0).long() << torch.arange(63, device=x.device)).sum(-1)


def bits_set(x: Tensor) -> Tensor:
    """How many bits of int64 x >= 0 are ones."""
    total = torch.zeros_like(x)
    for at in range(63):
        total = total + ((x >> at) & 1)
    return total


def xnor_product(a: Tensor, b: Tensor, n: int) -> Tensor:
    """sign(x) sign(y)^T (..., i, j) from packed a (..., i, words), b (..., j, words) of n signs each: n - 2 popcount(a xor b)."""
    return n - 2 * bits_set(a[..., :, None, :] ^ b[..., None, :, :]).sum(-1)
