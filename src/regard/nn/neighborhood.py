"""A layer of neighbourhood attention on maps (Hassani et al., 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..mechanisms.selected.fused_neighborhood import Axes, na2d


class NeighborhoodAttention2D(nn.Module):
    """x (B, X, Y, dim) -> (B, X, Y, dim). bias: a learned relative bias, which needs explicit weights."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: Axes = 7,
        *,
        dilation: Axes = 1,
        causal: bool | tuple[bool, bool] = False,
        bias: bool = False,
    ):
        super().__init__()
        self.heads, self.kernel_size, self.dilation, self.causal = heads, kernel_size, dilation, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * 2
        self.bias = nn.Parameter(0.02 * torch.randn(heads, (2 * sizes[0] - 1) * (2 * sizes[1] - 1))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        backend = "fused" if self.bias is None else "unfused"
        o = na2d(q, k, v, self.kernel_size, dilation=self.dilation, is_causal=self.causal, backend=backend, bias=self.bias)
        return self.out(o.flatten(-2))  # type: ignore[no-any-return]
