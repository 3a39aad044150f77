"""Attention alone, for circuits that are wired or worked out by hand."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from regard.nn.attention import Attention


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, norm: nn.Module, bias: bool):
        super().__init__()
        self.norm1, self.attention = norm, Attention(dim, heads, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x))


class Bare(nn.Module):
    """ids (B, L) -> logits: attention alone, without norms (or with LayerNorm)."""

    def __init__(
        self, vocab: int = 20, dim: int = 24, heads: int = 4, layers: int = 2, length: int = 12, norm: bool = False, bias: bool = False
    ):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Parameter(torch.randn(length, dim))
        self.blocks = nn.ModuleList(Layer(dim, heads, nn.LayerNorm(dim) if norm else nn.Identity(), bias) for _ in range(layers))
        self.out = nn.Linear(dim, vocab, bias=False)

    def layer(self, at: int) -> Attention:
        return cast(Layer, self.blocks[at]).attention

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.out(x)
