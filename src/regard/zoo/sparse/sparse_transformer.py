"""Sparse Transformer: factorised causal patterns that reach every key in two hops (id 269; Child et al., 2019).

strided: A1 = last l + 1 keys, A2 = keys at multiples of l back;  fixed: A1 = own block of l, A2 = last c columns of each block
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.algebra import Causal, Columns, FixedBlock, Mask, Mechanism, PerHead, Strided, Weighted, Window
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention


def patterns(pattern: str, stride: int, count: int, start: int | None = None) -> tuple[Mask, Mask]:
    """The two sets (A1, A2) as masks. start: which columns of a block the fixed A2 reads (None: the last `count`)."""
    if pattern == "strided":
        return Causal() & Window(stride + 1), Causal() & Strided(stride)
    if pattern != "fixed":
        raise RegardError(f"pattern={pattern!r}; expected strided or fixed")
    if count > stride:
        raise RegardError(f"count={count}: expected at most stride={stride}")
    return Causal() & FixedBlock(stride), Causal() & Columns(stride, count, stride - count if start is None else start)


@register("sparse-transformer")
def sparse_transformer(pattern: str = "fixed", stride: int = 128, count: int = 32, integration: str = "merged", layer: int = 0) -> Weighted:
    """stride: l, about sqrt(n). count: c, for the fixed pattern. integration: "merged" (a head reads the union), "heads" (heads
    alternate between the sets) or "interleaved" (layer r reads set r mod 2; pass `layer`)."""
    first, second = patterns(pattern, stride, count)
    if integration == "merged":
        return Weighted(mask=first | second)
    if integration == "heads":
        return Weighted(mask=PerHead((first, second)))
    if integration == "interleaved":
        return Weighted(mask=(first, second)[layer % 2])
    raise RegardError(f"integration={integration!r}; expected merged, heads or interleaved")


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
