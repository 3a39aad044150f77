"""MoBA: mixture of block attention, a router picks key blocks for each query (id 228; Lu et al., 2025).

query t reads its own block (causally) and the top_k - 1 past complete blocks of largest q_t . mean(k in block); exact softmax
over the tokens of those blocks; no gradient through the choice
"""

from regard.algebra import Causal, TopBlocks, Weighted
from regard.catalog.registry import register


@register("moba")
def moba(block_size: int = 512, top_k: int = 3) -> Weighted:
    """block_size: keys a block. top_k: blocks a query reads, its own counted. Switch to "softmax" at any step or layer for full attention."""
    return Weighted(mask=Causal(), select=TopBlocks(block_size, top_k))
