"""Softmax attention, the baseline (Vaswani et al., 2017).

p_ij = exp(s_ij) / sum_j exp(s_ij),   s_ij = q_i.k_j / sqrt(D)
"""

from regard.algebra import Weighted
from regard.catalog.registry import register


@register("softmax")
def softmax() -> Weighted:
    """Plain scaled dot-product attention."""
    return Weighted()
