"""Blocks ranked by attention to compressed keys, one choice for all heads that share keys: what NSA, SSA, InfLLM-V2 and ASA select with."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import probabilities, top_k
from .select import Selection, View


def kernels(x: Tensor, size: int, stride: int) -> Tensor:
    """Means over complete windows: (..., L, D) -> (..., m, D), window m the tokens m stride .. m stride + size - 1."""
    if x.shape[-2] < size:
        return x[..., :0, :]
    return x.unfold(-2, size, stride).mean(-1)


def kernel_probabilities(q: Tensor, compressed: Tensor, first: int, size: int, stride: int) -> Tensor:
    """(B, H, Lq, m): softmax over the windows that are complete at each query, its own token included; zero before the first is."""
    group = q.shape[1] // compressed.shape[1]
    at = torch.arange(first, first + q.shape[-2], device=q.device)[:, None]
    ends = torch.arange(compressed.shape[-2], device=q.device) * stride + size - 1
    scores = q.unflatten(1, (-1, group)) @ compressed.unsqueeze(2).transpose(-1, -2)
    return probabilities(scores.flatten(1, 2), ends <= at)


def group_sum(p: Tensor, kv_heads: int) -> Tensor:
    """(B, H, ...) -> (B, Hkv, ...): summed over the query heads of each key head."""
    return p.unflatten(1, (kv_heads, -1)).sum(2)


def shared_units(p: Tensor, size: int, stride: int, block: int, count: int) -> Tensor:
    """(..., m) window masses -> (..., count) blocks: a window counts once for every `stride` tokens that it shares with a block (NSA)."""
    starts = torch.arange(p.shape[-1], device=p.device)[:, None] * stride + torch.arange(0, size, stride, device=p.device)
    place = (starts // block).clamp(max=count - 1)
    weights = torch.zeros(p.shape[-1], count, dtype=p.dtype, device=p.device)
    return p @ weights.scatter_add_(1, place, torch.ones_like(place, dtype=p.dtype))


def largest_touching(p: Tensor, size: int, stride: int, block: int, count: int) -> Tensor:
    """(..., m) -> (..., count): the largest mass among the windows that reach into each block (InfLLM-V2)."""
    per = block // stride
    wide = per + size // stride - 1
    padded = torch.nn.functional.pad(p, (size // stride - 1, max(0, count * per - p.shape[-1])))
    return padded.unfold(-1, wide, per).amax(-1)[..., :count]


def grouped_blocks(q: Tensor, k: Tensor, view: View, *, block_size: int, top_k: int) -> Selection | None:
    """Each query's own block and the best past ones by the mass of their mean key, one choice a key head (q times scale); None: all."""
    count, kv_heads = -(-k.shape[-2] // block_size), k.shape[1]
    if top_k >= count:
        return None
    p = group_sum(kernel_probabilities(q, kernels(k, block_size, block_size), view.first, block_size, block_size), kv_heads)
    p = torch.nn.functional.pad(p, (0, count - p.shape[-1]))
    return best_blocks(p, view.first, block_size, top_k, q.shape[1])


def best_blocks(importance: Tensor, first: int, block_size: int, count: int, heads: int) -> Selection:
    """importance (B, Hkv, Lq, n) -> a query's own block and the `count - 1` best before it, for every head of the group."""
    own = torch.arange(first, first + importance.shape[-2], device=importance.device)[:, None] // block_size
    block = torch.arange(importance.shape[-1], device=importance.device)
    keep = (block == own) | top_k(importance, block < own, count - 1)
    return Selection(keep.repeat_interleave(heads // importance.shape[1], 1), 1, block_size)
