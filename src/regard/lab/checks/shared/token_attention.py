"""Attention of tokens written out from the projections of a `TokenAttention`."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab.checks.shared.layers import joined, split
from regard.nn.images.token_attention import TokenAttention


def attended(layer: TokenAttention, x: Tensor, source: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v and the output projection; visible (N, M) bool: which keys a query sees."""

    def linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return y @ weight.T if bias is None else y @ weight.T + bias

    q = linear(x, layer.q.weight, layer.q.bias)
    k, v = linear(x if source is None else source, layer.kv.weight, layer.kv.bias).chunk(2, -1)
    q, k, v = (split(y, layer.heads) for y in (q, k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if layer.scale is None else layer.scale)
    s = s if visible is None else s.masked_fill(~visible, -torch.inf)
    return linear(joined(s.softmax(-1) @ v), layer.out.weight, layer.out.bias)


def same_window(height: int, width: int, size: int) -> Tensor:
    """(N, N) bool: tokens of a grid, row by row, that stand in one window."""
    at = torch.arange(height)[:, None] // size * width + torch.arange(width) // size
    return at.flatten()[:, None] == at.flatten()
