"""The Sparse Transformer's residual block: pre-norm, scaled initialisation, recomputation of attention and MLP (Child et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..algebra import Mechanism
from .attention import Attention


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SparseBlock(nn.Module):
    """x -> x + a + b, a = dropout(attention(norm(x))), b = dropout(mlp(norm(x + a))).

    layers: N of the whole stack; output weights of both branches start at 1/sqrt(2 N) of the usual. recompute: keep only the block's
    input and compute attention and MLP again in the backward pass.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: str | Mechanism = "sparse-transformer",
        *,
        layers: int = 1,
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim, heads, mechanism)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), QuickGELU(), nn.Linear(4 * dim, dim))
        self.dropout, self.recompute = nn.Dropout(dropout), recompute
        for linear in (self.attention.out, self.mlp[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=(2 * layers * linear.in_features) ** -0.5)

    def branches(self, x: Tensor) -> Tensor:
        a = self.dropout(self.attention(self.norm1(x)))
        return a + self.dropout(self.mlp(self.norm2(x + a)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return x + checkpoint(self.branches, x, use_reentrant=False)  # type: ignore[no-any-return]
        return x + self.branches(x)


def position_embedding(length: int, stride: int, dim: int) -> nn.ModuleList:
    """Learned embeddings of attention-shaped coordinates (i // stride, i mod stride), std 0.125 / sqrt(dim); add both to the tokens'."""
    tables = nn.ModuleList([nn.Embedding(-(-length // stride), dim), nn.Embedding(stride, dim)])
    for table in tables:
        nn.init.normal_(table.weight, std=0.125 * dim**-0.5)  # type: ignore[arg-type]
    return tables
