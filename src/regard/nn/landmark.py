"""Landmark attention: a token at the end of each block opens it for later queries (Mohtashami and Jaggi, 2023).

p0 = softmax over the query's own block (up to it) and landmarks of past blocks;  p_b = softmax inside block b
a_ij = p0(j) in the own block, p0(landmark_b) p_b(j) in past ones; landmarks themselves weigh nothing
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Rope
from ..algebra.blocks import HIDDEN
from ..catalog.registry import register
from ..errors import RegardError


def grouped_softmax(s: Tensor, block: int, first: int = 0, retrieved: Tensor | None = None) -> Tensor:
    """Weights (..., n, L) of logits s (..., n, L), rows at positions first .. first + n - 1; every block + 1-st token is a landmark.

    block: ordinary tokens a block. retrieved (..., n, blocks) bool: past blocks that may be read (None: all of them).
    """
    rows, length, size = s.shape[-2], s.shape[-1], block + 1
    i = torch.arange(first, first + rows, device=s.device)[:, None]
    j = torch.arange(length, device=s.device)
    own, mark = (i // size) == (j // size), j % size == block
    count = -(-length // size)
    past = torch.arange(count, device=s.device) < i // size
    if retrieved is not None:
        past = past & retrieved
    padded = F.pad(s, (0, count * size - length), value=HIDDEN).unflatten(-1, (count, size))
    inside = padded[..., :block].softmax(-1).nan_to_num(0.0)  # p_b of every block; used for past ones alone
    marks = padded[..., block].masked_fill(~past, HIDDEN)
    near = s.masked_fill(~(own & (j <= i) & ~mark), HIDDEN)
    p0 = torch.cat((near, marks), -1).softmax(-1).nan_to_num(0.0)  # a landmark's own row may see nothing
    far = F.pad(p0[..., length:, None] * inside, (0, 1)).flatten(-2)[..., :length]
    return p0[..., :length] + far


def with_landmarks(tokens: Tensor, block: int, landmark: int) -> Tensor:
    """Token ids (B, n) with `landmark` after every `block` of them."""
    whole = tokens.shape[1] // block * block
    blocks = F.pad(tokens[:, :whole].unflatten(1, (-1, block)), (0, 1), value=landmark).flatten(1)
    return torch.cat((blocks, tokens[:, whole:]), 1)


@dataclass
class LandmarkCache:
    """Unrotated keys and values of everything so far, (B, H, n, D); blocks are complete once their landmark is in."""

    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(x.shape[-2] for x in self.k)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.k, *self.v))


@register("landmark-attention", kind="module")
class LandmarkAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), causal; every block + 1-st token of x is a landmark (`with_landmarks`).

    block: l_b ordinary tokens. rope: rotary positions. top_blocks: past blocks that `step` retrieves a head and query (None: all).
    remap: positions of retrieved blocks: right before the own block, in order, so that distances stay short; False keeps the true ones.
    """

    def __init__(self, dim: int, heads: int, *, block: int = 63, rope: bool = True, top_blocks: int | None = None, remap: bool = True):
        super().__init__()
        if dim % heads or block < 1:
            raise RegardError(f"dim={dim}, heads={heads}, block={block}: expected a multiple, and at least one token a block")
        self.heads, self.block, self.top_blocks, self.remap = heads, block, top_blocks, remap
        self.qkv, self.out, self.rope = nn.Linear(dim, 3 * dim, False), nn.Linear(dim, dim, False), Rope() if rope else None

    def turned(self, x: Tensor, place: Tensor) -> Tensor:
        return x if self.rope is None else self.rope.rotate(x, place)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1], device=x.device)
        q, k = self.turned(q, at), self.turned(k, at)
        rows = []
        for start in range(0, x.shape[1], 512):  # rows of the matrix a piece at a time; what later rows see is cut off
            part = q[:, :, start : start + 512]
            stop = start + part.shape[2]
            s = part @ k[:, :, :stop].transpose(-1, -2) * q.shape[-1] ** -0.5
            rows.append(grouped_softmax(s, self.block, start) @ v[:, :, :stop])
        return self.out(torch.cat(rows, 2).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def step(self, x: Tensor, cache: LandmarkCache | None = None) -> tuple[Tensor, LandmarkCache]:
        """One new token (B, 1, dim): landmarks are scored, the best `top_blocks` opened."""
        cache = cache or LandmarkCache()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cache.k, cache.v = [torch.cat((*cache.k, k), 2)], [torch.cat((*cache.v, v), 2)]
        keys, values, size = cache.k[0], cache.v[0], self.block + 1
        i = keys.shape[2] - 1
        past = i // size
        place = torch.arange(i + 1, device=x.device).expand(*q.shape[:2], -1)
        count = -(-(i + 1) // size)
        retrieved = torch.ones(*q.shape[:2], 1, count, dtype=torch.bool, device=x.device)
        if self.top_blocks is not None and past:
            spread = self.turned(q, torch.tensor([i], device=x.device)), self.turned(keys, place[0, 0])
            scores = (spread[0] @ spread[1][:, :, self.block : past * size : size].transpose(-1, -2))[:, :, 0]
            best = scores.topk(min(self.top_blocks, past), -1).indices.sort(-1).values
            retrieved = torch.zeros_like(retrieved).scatter_(-1, best[:, :, None], True)
            if self.remap:
                moved = torch.zeros(*q.shape[:2], count, dtype=torch.long, device=x.device)
                steps = (past - best.shape[-1] + torch.arange(best.shape[-1], device=x.device)).expand(best.shape)
                moved.scatter_(-1, best, steps)
                moved[..., past] = past
                place = moved.gather(-1, place // size) * size + place % size
        turned_k = keys if self.rope is None else self.rope.rotate(keys, place)
        s = self.turned(q, torch.tensor([i], device=x.device)) @ turned_k.transpose(-1, -2) * q.shape[-1] ** -0.5
        o = grouped_softmax(s, self.block, i, retrieved) @ values
        return self.out(o.transpose(1, 2).flatten(-2)), cache
