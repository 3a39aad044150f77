"""Rotary positions, norms and heads of layers, written from their definitions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, places: Tensor, base: float = 10000.0) -> Tensor:
    """x (..., n, D) at `places` (n,): channel c and c + D/2 are one complex number, turned by place * base^(-2c/D)."""
    half = x.shape[-1] // 2
    angle = places[:, None].to(torch.float64) * base ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def rms(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def standard(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance over channels."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads * D) -> (B, heads, L, D)."""
    return torch.stack(x.chunk(heads, -1), 1)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads * D)."""
    return torch.cat(list(x.unbind(1)), -1)
