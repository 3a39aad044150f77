"""Neural attention: a small network scores each pair (id 46; DiGiugno & Mahmood, 2025).

p_i = softmax_j(w_3 . relu(W_2 relu(W_1 [A q_i + a; B k_j + b] + b_1) + b_2) + b_3)
"""

from regard.algebra import Network, Weighted
from regard.catalog.registry import register


@register("neural-attention")
def neural_attention(width: int = 16) -> Weighted:
    """width: channels D' that q and k are projected to; a pair costs D'^2 / 2 multiplications. Its memory is one tile times D'."""
    return Weighted(score=Network(width))
