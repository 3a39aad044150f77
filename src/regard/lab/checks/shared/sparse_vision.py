"""Bi-level routing with the mask of regions written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.zoo.sparse.biformer import BiLevelRoutingAttention


def routed(layer: BiLevelRoutingAttention, x: Tensor, routes: Tensor) -> Tensor:
    """Bi-level routing with the region mask written out pixel by pixel, for given routes (N, S^2, k)."""
    n, height, width, c = x.shape
    s = layer.regions
    region = (torch.arange(height)[:, None] // (height // s) * s + torch.arange(width) // (width // s)).flatten()
    allowed = torch.zeros(n, s * s, s * s, dtype=torch.bool).scatter_(-1, routes, True)
    mask = allowed[:, region][:, :, region]
    q, k, v = layer.qkv(x).split((layer.qk_dim, layer.qk_dim, c), -1)
    heads = [y.flatten(1, 2).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (q, k, v)]
    scores = (layer.scale * heads[0] @ heads[1].transpose(-1, -2)).masked_fill(~mask[:, None], -math.inf)
    o = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(-2).unflatten(1, (height, width))
    assert layer.lepe is not None
    return layer.out(o + layer.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


def mean_routes(layer: BiLevelRoutingAttention, x: Tensor, count: int) -> Tensor:
    """Top regions from explicit means of q and k over each region."""
    s = layer.regions
    q, k, _ = layer.qkv(x).split((layer.qk_dim, layer.qk_dim, x.shape[-1]), -1)
    means = []
    for y in (q, k):
        h, w = y.shape[1] // s, y.shape[2] // s
        means.append(torch.stack([y[:, a * h : (a + 1) * h, b * w : (b + 1) * w].mean((1, 2)) for a in range(s) for b in range(s)], 1))
    return (means[0] @ means[1].transpose(-1, -2)).topk(count, -1).indices
