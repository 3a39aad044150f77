"""LongHeads: every head attends to a few chunks moved next to each other, inside the trained length (id 221; Lu et al., 2024).

c_v = mean over a chunk of softmax(q k^T) v, positions restarted;  c_k = softmax(c_v k^T) k;  chunks: 0, the last two, the best q c_k
keys of the n chosen chunks stand at 0 .. n w - 1, the query at (n - 1) w + (i mod w)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, Input, Rope, Selection, View, Weighted, bind
from regard.algebra.blocks import heads_of, top_k
from regard.catalog.registry import register
from regard.engine import merge
from regard.engine.door import attend_with_stats
from regard.engine.policy import Policy
from regard.errors import RegardError


@dataclass
class LongHeadsCache:
    """Unrotated q, k, v so far, (B, H, n, D), and a key for every complete chunk (B, H, c, D); `device`: where they live."""

    device: torch.device | str | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    open_q: Tensor | None = None  # queries of the chunk that is not full yet
    chunk_keys: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[-2]


def named(q: Tensor, k: Tensor, view: View, *, size: int) -> Selection:
    """Of each query, the one chunk whose number it was given."""
    chunks = torch.arange(-(-k.shape[-2] // size), device=q.device)
    return Selection((view.inputs["chunk"] == chunks).expand(*q.shape[:-1], -1), 1, size)


@register("longheads", kind="policy")
class LongHeads(Policy):
    """For frozen models with rotary positions; q, k, v (B, H or Hkv, L, D) come before rotation.

    chunk: w. attend_len: A, at most the trained length, a multiple of w; the first A tokens run densely, later queries read A / w chunks.
    released: a decoded token that fills its chunk takes that chunk for the last complete one, as released code does, and reads one chunk less
    than the same token of a prompt. Prompt queries read their own key (released ones stop before it).
    """

    rotated = False

    def __init__(self, chunk: int = 256, attend_len: int = 4096, rope: Rope | None = None, released: bool = False):
        if attend_len % chunk or attend_len // chunk < 3:
            raise RegardError(f"chunk={chunk}, attend_len={attend_len}: expected at least three whole chunks")
        self.chunk, self.attend_len, self.chunks, self.rope = chunk, attend_len, attend_len // chunk, rope or Rope()
        self.released = released

    def chunk_keys(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, c, D): a key for every complete chunk."""
        size, whole = self.chunk, k.shape[-2] // self.chunk * self.chunk
        at = torch.arange(size, device=q.device)
        q, k, v = (heads_of(x, q.shape[1])[..., :whole, :].unflatten(-2, (-1, size)) for x in (q, k, v))
        q, k = self.rope.rotate(q, at), self.rope.rotate(k, at)
        scale = q.shape[-1] ** -0.5
        value = ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).mean(-2, keepdim=True)
        return ((value @ k.transpose(-1, -2) * scale).softmax(-1) @ k).squeeze(-2)

    def select(self, q: Tensor, chunk_keys: Tensor, first: int, closing: bool = False) -> Tensor:
        """Chunk ids (B, H, Lq, n), ascending, of queries at first, first + 1, ...: 0, the own one, the one before it, and the best others.

        closing: the own chunk counts as the last complete one, so that the one before it is ranked, and there is one chunk less.
        """
        own = torch.arange(first, first + q.shape[-2], device=q.device)[:, None] // self.chunk
        chunks = torch.arange(int(own.max()) + 1, device=q.device)
        scores = q @ chunk_keys.transpose(-1, -2)
        scores = torch.nn.functional.pad(scores, (0, len(chunks)))[..., : len(chunks)]  # chunks that have no key yet
        count, ranked = self.chunks - closing, own - 1 + closing
        forced = (chunks == 0) | ((chunks <= own) & (chunks >= ranked))
        keep = forced | top_k(scores, (chunks < ranked) & (chunks > 0), count - forced.sum(-1, keepdim=True))
        return keep.int().argsort(dim=-1, descending=True, stable=True)[..., :count]

    def rows(self, q: Tensor, k: Tensor, v: Tensor, chunk_keys: Tensor, first: int, ids: Tensor | None = None) -> Tensor:
        """Outputs of the last queries q, at first, first + 1, ... (all from attend_len on), over keys so far.

        Keys turn by their place in their chunk, so a chunk moved to place n is read by queries turned n chunks less: a call a place.
        """
        size = self.chunk
        ids = self.select(q, chunk_keys, first) if ids is None else ids
        at = torch.arange(first, first + q.shape[-2], device=q.device)
        turned = self.rope.rotate(k, torch.arange(k.shape[-2], device=q.device) % size)
        one = Weighted(mask=Causal(), select=Chosen(bind(named, size=size)), inputs=(Input("chunk", "bhq", dtype="int"),))
        parts = []
        for place in range(ids.shape[-1]):
            back = self.rope.rotate(q, (ids.shape[-1] - 1 - place) * size + at % size)
            parts.append(attend_with_stats(back, turned, v, one, chunk=ids[..., place]))
        return merge(Weighted(), parts)[0]

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.prefill(q, k, v)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, L, Dv): the first attend_len rows densely, then by chunks; a query reads its own key."""
        head = min(self.attend_len, q.shape[-2])
        out = [self.dense(q[..., :head, :], k[..., :head, :], v[..., :head, :])]
        if head < q.shape[-2]:
            out.append(self.rows(q[..., head:, :], k, v, self.chunk_keys(q, k, v), head))
        return torch.cat(out, -2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: LongHeadsCache | None = None) -> tuple[Tensor, LongHeadsCache]:
        """One new token: chunks that have filled up have a key, the query reads n chunks of the cache."""
        cache = cache or LongHeadsCache()
        home = cache.device or k.device
        old_k, old_v = cache.k, cache.v
        cache.k, cache.v = (x.to(home) if old is None else torch.cat((old, x.to(home)), -2) for old, x in ((old_k, k), (old_v, v)))
        cache.open_q = q if cache.open_q is None else torch.cat((cache.open_q, q), -2)
        i = cache.length - 1
        if i < self.attend_len:
            out = self.dense(q, cache.k.to(q.device), cache.v.to(q.device))
        else:
            keys = torch.cat(cache.chunk_keys, -2)
            closing = self.released and cache.length % self.chunk == 0
            ids = self.select(q, keys, i, closing=True) if closing else None
            out = self.rows(q, cache.k.to(q.device), cache.v.to(q.device), keys, i, ids)
        if cache.length % self.chunk == 0:
            last = [x[..., -self.chunk :, :].to(q.device) for x in (cache.k, cache.v)]
            cache.chunk_keys.append(self.chunk_keys(cache.open_q, *last))
            cache.open_q = None
        return out, cache
