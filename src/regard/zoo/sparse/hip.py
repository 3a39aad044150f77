"""HiP: the best keys of each query block by descending a tree of key groups (id 122; Lee et al., 2024).

K groups of key blocks; each is split in two, each half scored by its first block (max over queries and keys of q.k), the best K stay;
after log2(blocks / K) rounds groups are single blocks. Right where a group's first block tells how the group scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, Selection, Sizes, View, Weighted, bind
from regard.algebra.blocks import heads_of
from regard.algebra.select import scoring
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError


@register("hip")
def hip(
    mask_k: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    sinks: int = 4,
    window: int = 64,
    query_stride: int = 2,
    representative: str = "first",
) -> Weighted:
    """mask_k: keys a query block reads, beside the first `sinks` and the last `window`. query_stride: every so many queries of a block score.
    representative: "first" or "middle" block of a group. Training-free; a single query descends by itself."""
    constants = {"mask_k": mask_k, "block_q": block_q, "block_k": block_k, "sinks": sinks, "window": window}
    rest = {"query_stride": query_stride, "representative": representative}
    return Weighted(
        mask=Causal(),
        select=Chosen(
            bind(hip_plan, **constants, **rest),
            ahead=True,
            cost=bind(hip_cost, mask_k=mask_k, block_k=block_k, query_stride=query_stride),
            by_sequence=True,
        ),
    )


def hip_cost(sizes: Sizes, *, mask_k: int, block_k: int, query_stride: int) -> int:
    """The sampled queries against two halves of mask_k keys' groups in each of log2(blocks / groups) rounds."""
    rounds = max(0, math.ceil(math.log2(max(1.0, sizes.k_len / max(mask_k, block_k)))))
    return scoring(sizes, sizes.q_len / query_stride, 2 * max(mask_k, block_k) * rounds)


def descend(q: Tensor, k: Tensor, last: int, blocks: int, block_k: int, representative: str) -> tuple[Tensor, int]:
    """The chosen blocks of k[..., :last, :] for one block of queries q (B, H, n, D), (B, H, blocks), and the keys read a head."""
    total = -(-last // block_k)
    lead, device = q.shape[:2], q.device
    edges = torch.arange(blocks + 1, device=device) * total // blocks
    start = edges[:-1].expand(*lead, -1).clone()
    size = (edges[1:] - edges[:-1]).expand(*lead, -1).clone()
    inside = torch.arange(block_k, device=device)
    reads = 0
    while int(size.max()) > 1:
        left = size // 2
        starts, sizes = torch.cat((start, start + left), -1), torch.cat((left, size - left), -1)
        shown = starts + sizes // 2 if representative == "middle" else starts
        keys = (shown.clamp(max=total - 1)[..., None] * block_k + inside).clamp(max=last - 1).flatten(-2)
        picked = k.gather(-2, keys[..., None].expand(*keys.shape, k.shape[-1]))
        reads += keys.shape[-1]
        score = (q @ picked.transpose(-1, -2)).amax(-2).unflatten(-1, (-1, block_k)).amax(-1)
        best = score.masked_fill(sizes == 0, float("-inf")).topk(blocks, -1).indices
        start, size = starts.gather(-1, best), sizes.gather(-1, best)
    return start, reads


def hip_plan(q: Tensor, k: Tensor, view: View, **constants: Any) -> Selection:
    """Which key blocks each block of queries reads; `tree` also tells what the choice cost."""
    return tree(q, k, view.first, **constants)[0]


def tree(
    q: Tensor,
    k: Tensor,
    first: int,
    mask_k: int,
    block_q: int,
    block_k: int,
    sinks: int,
    window: int,
    query_stride: int,
    representative: str,
) -> tuple[Selection, list[int]]:
    """The selection, and how many keys each query block's descent has read."""
    k, blocks = heads_of(k, q.shape[1]), max(1, mask_k // block_k)
    total = -(-k.shape[-2] // block_k)
    at = torch.arange(total, device=q.device) * block_k
    rows, reads = [], []
    for begin in range(0, q.shape[-2], block_q):
        part = q[..., begin : begin + block_q, :]
        end = min(max(first + begin + part.shape[-2], 1), k.shape[-2])  # keys up to the block's last query
        open_end = max(first + begin - window + 1, 0)  # what every query's window holds need not be searched
        keep = (at < sinks) | (at + block_k > open_end)
        keep = keep.expand(*q.shape[:2], -1).clone()
        searched = min(open_end, end) if window else end
        if searched <= mask_k:
            keep |= at < searched
            reads.append(0)
        else:
            found, read = descend(part[..., ::query_stride, :], k, searched, blocks, block_k, representative)
            keep.scatter_(-1, found, True)
            reads.append(read)
        rows.append(keep)
    empty = torch.zeros(*q.shape[:2], 0, total, dtype=torch.bool, device=q.device)
    return Selection(torch.stack(rows, -2) if rows else empty, block_q, block_k), reads


class CachedHip:
    """Decoding that descends the tree once in `refresh` tokens and reads the blocks found last in between, beside sinks and window as they
    stand; tokens that have left the window since are read too. The other arguments are `hip`'s; refresh=1 is its own decoding.

    `step(q, k, v)`: q (B, H, 1, D), the newest token's; k, v (B, Hkv, L, D), all so far -> (B, H, 1, Dv). `descents`: how many there were.
    """

    def __init__(
        self, refresh: int = 8, *, mask_k: int = 512, block_k: int = 2, sinks: int = 4, window: int = 64, representative: str = "first"
    ):
        if refresh < 1:
            raise RegardError(f"refresh={refresh}; expected at least 1 token")
        self.refresh, self.block_k, self.sinks, self.window = refresh, block_k, sinks, window
        self.rest = {"mask_k": mask_k, "block_q": 1, "query_stride": 1, "representative": representative}
        self.found: Tensor | None = None  # (B, H, blocks) at the last descent
        self.last, self.descents = 0, 0

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = k.shape[-2]
        if self.found is None or not self.last <= length < self.last + self.refresh:
            mine: dict[str, Any] = {**self.rest, "block_k": self.block_k, "sinks": self.sinks, "window": self.window}
            self.found, self.last = tree(q, k, length - 1, **mine)[0].keep[:, :, 0], length
            self.descents += 1
        total = -(-length // self.block_k)
        near = torch.arange(total, device=q.device) * self.block_k + self.block_k > length - max(self.window, 1)
        keep = torch.nn.functional.pad(self.found, (0, total - self.found.shape[-1])) | near
        return attend(q, k, v, mask=keep.repeat_interleave(self.block_k, -1)[..., None, :length])
