"""Inverse-distance-weighting attention (id 26; McCarter, 2023).

p_ij = (1 / d_ij) / sum_l (1 / d_il),   d_ij = eps + |q_i - k_j|^power
"""

from ...algebra import Distance, Weighted
from ...catalog.registry import register


@register("idw-attention")
def idw(power: float = 2.0, eps: float = 1e-3, link: str = "log") -> Weighted:
    """link: "log" (the paper's), or its comparisons under softmax: "negative" -d, "gaussian" -d/2, "inverse" 1/d. No scale."""
    return Weighted(score=Distance(power, link, eps))
