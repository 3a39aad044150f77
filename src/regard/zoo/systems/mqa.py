"""Multi-query and grouped-query attention: key and value heads are shared (id 297; Shazeer, 2019; GQA, Ainslie et al., 2023).

query head h reads key/value head floor(h * kv_heads / heads); the cache holds kv_heads * (D + Dv) numbers a token
"""

from torch import Tensor

from regard.algebra import Recipe, Weighted
from regard.catalog.registry import register
from regard.errors import RegardError


@register("mqa")
def mqa(kv_heads: int = 1) -> Weighted:
    """Softmax attention whose layer has `kv_heads` key and value heads (1: multi-query). Any mechanism takes fewer kv heads."""
    return Weighted(recipe=Recipe(kv_heads=kv_heads))


def pool_heads(weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Mean-pool a key or value projection (heads * D, dim) to (kv_heads * D, dim), how GQA converts a trained model."""
    if heads % kv_heads or weight.shape[0] % heads:
        raise RegardError(
            f"weight {tuple(weight.shape)} with heads={heads}, kv_heads={kv_heads}: expected heads a multiple of kv_heads and rows of heads"
        )
    return weight.unflatten(0, (kv_heads, heads // kv_heads, -1)).mean(1).flatten(0, 1)


def decode_traffic(dim: int, heads: int, kv_heads: int, context: int, batch: int) -> float:
    """Memory traffic per arithmetic operation of one decoding step, Shazeer's model: 1/dim + context * kv_heads / (dim * heads) + 1/batch."""
    return 1 / dim + context * kv_heads / (dim * heads) + 1 / batch
