"""Landmark attention: a token at the end of each block opens it for later queries (Mohtashami and Jaggi, 2023).

p0 = softmax over the query's own block (up to it) and landmarks of past blocks;  p_b = softmax inside block b
a_ij = p0(j) in the own block, p0(landmark_b) p_b(j) in past ones; landmarks themselves weigh nothing
A pretrained decoder with rotary positions: `regard.adapt.landmarks.convert_landmark(model)`, then the recipe `landmark_tuning(...)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.algebra import Rope
from regard.algebra.blocks import HIDDEN
from regard.algebra.permute import taken
from regard.catalog.registry import register
from regard.engine.stream import KeyValueState
from regard.errors import RegardError
from regard.nn.landmarks import grouped_softmax, placed_softmax
from regard.nn.landmarks import with_landmarks as with_landmarks
from regard.nn.parts import takes, whole


@dataclass
class LandmarkCache:
    """Unrotated keys and values of everything so far, (B, H, n, D), in buffers that grow; blocks are complete once their landmark is in."""

    kept: KeyValueState | None = None

    @property
    def length(self) -> int:
        return 0 if self.kept is None else self.kept.length

    @property
    def bytes(self) -> int:
        return 0 if self.kept is None else self.kept.bytes

    def append(self, k: Tensor, v: Tensor) -> KeyValueState:
        old = self.kept or KeyValueState(k[..., :0, :], v[..., :0, :], 0)
        self.kept = old.append(k, v)
        return self.kept


SELECTIONS = ("token_and_head", "heads", "tokens")
PLACES = ("near", "front", "true")


@register("landmark-attention", kind="module")
class LandmarkAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), causal; every block + 1-st token of x is a landmark (`with_landmarks`), or those named.

    block: l_b ordinary tokens. rope: rotary positions, or a `Rope` of one's own. bias: of the projections. top_blocks: past blocks that `step`
    retrieves (None: all): for each token and head ("token_and_head"), or one choice for all "heads", or for all "tokens" of a call, by the
    largest probability among landmarks. places: of retrieved blocks: right before the own block, in order ("near"); counted from 0 with one
    block left out before the last top_blocks ones, the own block at min(blocks, top_blocks + 1), as released ("front"); or "true".
    """

    def __init__(
        self, dim: int, heads: int, *, block: int = 63, rope: bool | Rope = True, top_blocks: int | None = None, places: str = "near",
        selection: str = "token_and_head", bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.dim = dim
        if dim % heads or block < 1 or (top_blocks is not None and top_blocks < 1):
            raise RegardError(
                f"dim={dim}, heads={heads}, block={block}, top_blocks={top_blocks}: expected a multiple, and at least one token a block, and "
                "one block"
            )
        if selection not in SELECTIONS or places not in PLACES:
            raise RegardError(
                f"selection={selection!r}, places={places!r}; expected one of {', '.join(SELECTIONS)}, and of {', '.join(PLACES)}"
            )
        self.heads, self.block, self.top_blocks, self.places, self.selection = heads, block, top_blocks, places, selection
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim, bias)
        self.rope = rope if isinstance(rope, Rope) else Rope() if rope else None

    def turned(self, x: Tensor, place: Tensor) -> Tensor:
        return x if self.rope is None else self.rope.rotate(x, place)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    @takes(x="batch length dim")
    def forward(self, x: Tensor, landmarks: Tensor | None = None) -> Tensor:
        """landmarks (B, L) bool: which tokens are landmarks, where they do not stand at every block + 1-st place."""
        if landmarks is not None and (landmarks.dtype != torch.bool or landmarks.shape != x.shape[:2]):
            raise RegardError(f"landmarks is {landmarks.dtype} {tuple(landmarks.shape)}; expected bool {tuple(x.shape[:2])}")
        q, k, v = self.split(x)
        at = torch.arange(x.shape[1], device=x.device)
        q, k = self.turned(q, at), self.turned(k, at)
        rows = []
        for start in range(0, x.shape[1], 512):  # rows of the matrix a piece at a time; what later rows see is cut off
            part = q[:, :, start : start + 512]
            stop = start + part.shape[2]
            s = part @ k[:, :, :stop].transpose(-1, -2) * q.shape[-1] ** -0.5
            w = grouped_softmax(s, self.block, start) if landmarks is None else placed_softmax(s, landmarks[:, :stop], start)
            rows.append(w @ v[:, :, :stop])
        return self.out(torch.cat(rows, 2).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, cache: LandmarkCache | None = None) -> tuple[Tensor, LandmarkCache]:
        """New tokens (B, n, dim): landmarks of complete blocks are scored, the best `top_blocks` opened, and nothing else of the cache is read."""
        cache = cache or LandmarkCache()
        size, outs, start = self.block + 1, [], 0
        q, k, v = self.split(x)
        while start < x.shape[1]:  # up to the end of a block at a time
            stop = min(x.shape[1], start + size - cache.length % size)
            kept = cache.append(k[:, :, start:stop], v[:, :, start:stop])
            outs.append(self.opened(q[:, :, start:stop], kept.k, kept.v))
            start = stop
        return self.out(torch.cat(outs, 2).transpose(1, 2).flatten(-2)), cache

    def chosen(self, q: Tensor, keys: Tensor, first: int, count: int) -> Tensor | None:
        """Ids of blocks (B, H, n or 1, t), ascending, for queries at first, first + 1, ... of the open block; None: every one of `count`."""
        size, top = self.block + 1, self.top_blocks
        if top is None:
            return None
        at = torch.arange(first, first + q.shape[2], device=q.device)
        block = torch.arange(count, device=q.device)
        if self.places == "front":
            at, block = at - count * size + min(count, top + 1) * size, (block - max(0, count - top) + 1).clamp(min=0)
        marks = self.turned(keys[:, :, self.block : count * size : size], block * size + self.block)
        p = (self.turned(q, at) @ marks.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        p = p.amax(1, keepdim=True) if self.selection == "heads" else p.amax(2, keepdim=True) if self.selection == "tokens" else p
        best = p.topk(min(top, count), -1).indices.sort(-1).values
        return best.expand(-1, q.shape[1], -1, -1)

    def opened(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, H, n, D): the last n tokens, all of the open block, over it and the blocks they choose."""
        size, first = self.block + 1, keys.shape[2] - q.shape[2]
        count = first // size
        chosen = self.chosen(q, keys, first, count) if count else None
        best = torch.arange(count, device=q.device).expand(*q.shape[:2], 1, -1) if chosen is None else chosen
        slot, own = best, count
        if chosen is not None and self.places == "near":
            slot = (count - best.shape[-1] + torch.arange(best.shape[-1], device=q.device)).expand(best.shape)
        elif chosen is not None and self.places == "front":
            assert self.top_blocks is not None
            slot = torch.arange(best.shape[-1], device=q.device) + (best >= count - self.top_blocks).long()
            own = min(count, self.top_blocks + 1)
        at = torch.arange(keys.shape[2] - count * size, device=q.device) + own * size
        turned = self.turned(q, at[-q.shape[2] :]) * q.shape[-1] ** -0.5
        s = turned @ self.turned(keys[:, :, count * size :], at).transpose(-1, -2)
        near = s.masked_fill((at > at[-q.shape[2] :, None]) | (at % size == self.block), HIDDEN)
        blocks = [y[:, :, : count * size].unflatten(2, (count, size)).flatten(-2) for y in (keys, values)]
        k, v = (taken(y[:, :, None].expand(-1, -1, best.shape[2], -1, -1), best).unflatten(-1, (size, -1)) for y in blocks)
        place = slot[..., None] * size + torch.arange(size, device=q.device)
        s = (self.turned(k, place) @ turned[..., None, :, None]).squeeze(-1)  # (B, H, n, t, size)
        p0 = torch.cat((near, s[..., self.block]), -1).softmax(-1).nan_to_num(0.0)
        far = p0[..., near.shape[-1] :, None] * s[..., : self.block].softmax(-1)
        return p0[..., : near.shape[-1]] @ values[:, :, count * size :] + (far[..., None] * v[..., : self.block, :]).sum((-3, -2))
