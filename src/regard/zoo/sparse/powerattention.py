"""PowerAttention: blocks at powers of two back, so that d layers reach 2^d tokens without holes (id 90; Chen et al., 2025).

a query block u reads key block w iff u - w is 0 or a power of two, or u - w < window_blocks, or w < sink_blocks;  causal inside
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import BlockPowers, Causal, Mask, Sizes, Weighted
from regard.catalog.registry import register


@register("powerattention")
def power(block_size: int = 256, window_blocks: int = 5, sink_blocks: int = 1) -> Weighted:
    """block_size: 1 is the token form. A hybrid stack gives some layers "softmax" instead."""
    return Weighted(mask=Causal() & BlockPowers(block_size, window_blocks, sink_blocks))


def blocks_read(position: int, block_size: int, window_blocks: int = 0, sink_blocks: int = 0) -> list[int]:
    """The key blocks that decoding at `position` reads: O(log L) of them."""
    u = position // block_size
    return [w for w in range(u + 1) if (u - w) & (u - w - 1) == 0 or u - w < window_blocks or w < sink_blocks]


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
