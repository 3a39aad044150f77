"""Rotary positions, norms and heads of layers, written from their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rotary(x: Tensor, places: Tensor, base: float = 10000.0) -> Tensor:
    """x (..., n, D) at `places` (n,): channel c and c + D/2 are one complex number, turned by place * base^(-2c/D)."""
    half = x.shape[-1] // 2
    angle = places[:, None].to(torch.float64) * base ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def half_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, h, n, D) turned by angles whose cos and sin (n, D) or (B, n, D) are given, each angle twice, once a half."""
    half = x.shape[-1] // 2
    cos, sin = (t if t.dim() == 2 else t[:, None] for t in (cos, sin))
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rotary_heads(
    attention: Any, x: Tensor, cos: Tensor, sin: Tensor, through: Callable[[Any, Tensor], Tensor] | None = None
) -> list[Tensor]:
    """q, k, v (B, h, n, D) of a Llama's attention layer on x (B, n, dim), the first two turned. through: what a projection makes of x."""
    made = [(through or (lambda layer, y: layer(y)))(proj, x) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)]
    q, k, v = (y.view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2) for y in made)
    return [half_turned(q, cos, sin), half_turned(k, cos, sin), v]


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
