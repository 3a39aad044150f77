"""PowerAttention: blocks at powers of two back, so that d layers reach 2^d tokens without holes (id 90; Chen et al., 2025).

a query block u reads key block w iff u - w is 0 or a power of two, or u - w < window_blocks, or w < sink_blocks;  causal inside
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import BlockPowers, Causal, Mask, Sizes, Weighted, Where, bind
from regard.catalog.registry import register
from regard.errors import RegardError


@register("powerattention")
def power(block_size: int = 256, window_blocks: int = 5, sink_blocks: int = 1) -> Weighted:
    """block_size: 1 is the token form. A hybrid stack gives some layers "softmax" instead."""
    return Weighted(mask=Causal() & BlockPowers(block_size, window_blocks, sink_blocks))


def blocks_read(position: int, block_size: int, window_blocks: int = 0, sink_blocks: int = 0) -> list[int]:
    """The key blocks that decoding at `position` reads: O(log L) of them."""
    u = position // block_size
    return [w for w in range(u + 1) if (u - w) & (u - w - 1) == 0 or u - w < window_blocks or w < sink_blocks]


def shares_segment(b: Tensor, h: Tensor, i: Tensor, j: Tensor, segments: tuple[int, ...], rates: tuple[int, ...]) -> Tensor:
    seen = (i // segments[0] == j // segments[0]) & (i % rates[0] == h % rates[0]) & (j % rates[0] == h % rates[0])
    for size, rate in zip(segments[1:], rates[1:], strict=True):
        seen = seen | ((i // size == j // size) & (i % rate == h % rate) & (j % rate == h % rate))
    return seen


def longnet(segments: tuple[int, ...] = (2048, 4096, 8192), rates: tuple[int, ...] = (1, 2, 4)) -> Mask:
    """LongNet's pairs (Ding et al., 2023), a baseline: both tokens in one segment and, from head h on, every rate-th of it, of any of the
    patterns. Each rate divides its segment. LongNet weighs a softmax a pattern; as a mask the patterns are one softmax."""
    if len(segments) != len(rates) or not segments or any(rate < 1 or size % rate for size, rate in zip(segments, rates, strict=True)):
        raise RegardError(f"segments={segments}, rates={rates}; expected as many of both, each rate a divisor of its segment")
    return Causal() & Where(bind(shares_segment, segments=segments, rates=rates))


def receptive_field(mask: Mask, length: int, layers: int) -> Tensor:
    """(layers, length) bool: what the last token reaches after 1, 2, ... layers of `mask` with residual connections."""
    from regard.engine.pairs import indices

    at = indices(Sizes(1, 1, 1, length, length, 1, 1), torch.device("cpu"))
    seen = mask.visible(at["b"], at["h"], at["i"], at["j"], {"k_len": length, "offset": 0}).expand(1, 1, length, length)[0, 0]
    seen = seen | torch.eye(length, dtype=torch.bool)
    reached, rows = seen[-1], []
    for _ in range(layers):
        rows.append(reached)
        reached = seen[reached].any(0)
    return torch.stack(rows)
