"""Attention along both axes of a table, as in-context models of tables have it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..engine.door import attend


class TwoAxisAttention(nn.Module):
    """x (B, L, D), of (B, M, D) -> (B, L, D), without biases. attention: what runs, (q, k, v) -> out."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)
        self.attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attend

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TwoAxisLayer(nn.Module):
    """x (B, rows, groups, D): attention among a row's groups, then among a group's rows, then an MLP, each behind its residual normalised."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, multiquery_test: bool):
        super().__init__()
        self.features, self.rows = TwoAxisAttention(dim, heads), TwoAxisAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps, elementwise_affine=False) for _ in range(3))
        self.multiquery_test = multiquery_test

    def forward(self, x: Tensor, train: int, kept: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """train: how many rows are training rows, the first ones; kept: their keys and values where they are not there themselves."""
        b, n = x.shape[:2]
        flat = x.flatten(0, 1)
        x = self.norms[0](x + self.features(flat, *self.features.keys(flat)).unflatten(0, (b, n)))
        columns = x.transpose(1, 2).flatten(0, 1)  # (B groups, rows, D)
        k, v = self.rows.keys(columns[:, :train]) if kept is None else kept
        if self.multiquery_test:
            one = k[:, :1], v[:, :1]
            parts = [self.rows(columns[:, :train], k, v)] if train else []
            moved = torch.cat([*parts, self.rows(columns[:, train:], *one)], 1) if n > train else parts[0]
        else:
            moved = self.rows(columns, k, v)
        x = self.norms[1](x + moved.unflatten(0, (b, -1)).transpose(1, 2))
        return self.norms[2](x + self.mlp(x)), (k, v)
