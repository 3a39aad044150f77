"""Symbols: learned codes of tokens, of positions or of relative positions, beside which relations are read (Altabaa & Lafferty, 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine.door import attend


class SymbolicAttention(nn.Module):
    """Symbols of tokens: s_i = softmax(x_i W_q T^T / sqrt(d)) S with templates T and a library S: x (B, L, dim) -> (B, L, dim).
    d: of a head. bias: of W_q."""

    def __init__(self, dim: int, symbols: int = 32, heads: int = 4, bias: bool = False):
        super().__init__()
        self.heads, self.q = heads, nn.Linear(dim, dim, bias)
        self.templates, self.library = (nn.Parameter(torch.randn(symbols, dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for y in (self.q(x), self.templates, self.library))
        batch = x.shape[0]
        out = attend(q, k.expand(batch, -1, -1, -1).contiguous(), v.expand(batch, -1, -1, -1).contiguous())
        return out.transpose(1, 2).flatten(-2)


class PositionalSymbols(nn.Module):
    """A learned code a position: (L, dim) for L <= max_len."""

    def __init__(self, dim: int, max_len: int = 1024):
        super().__init__()
        self.library = nn.Parameter(torch.randn(max_len, dim))

    def forward(self, length: int, first: int = 0) -> Tensor:
        return self.library[first : first + length]


class RelativeSymbols(nn.Module):
    """A learned code a relative position i - j, clipped at max_rel: (Lq, Lk, dim)."""

    def __init__(self, dim: int, max_rel: int = 64):
        super().__init__()
        self.max_rel, self.library = max_rel, nn.Parameter(torch.randn(2 * max_rel + 1, dim))

    def forward(self, q_len: int, k_len: int) -> Tensor:
        apart = torch.arange(k_len - q_len, k_len)[:, None] - torch.arange(k_len)
        return self.library[apart.clamp(-self.max_rel, self.max_rel) + self.max_rel]
