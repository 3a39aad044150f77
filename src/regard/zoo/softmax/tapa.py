"""Token-aware phase attention: distance turns the score by an angle that depends on the tokens (id 252; Yu et al., 2025).

s_ij = qA_i.kA_j / sqrt(theta D) * cos(2 pi |i - j|^alpha phi_ij),   phi_ij = qP_i.kP_j / sqrt((1 - theta) D)
"""

from regard.algebra import Phase, Recipe, Weighted
from regard.catalog.registry import register


@register("tapa")
def tapa(alpha: float = 0.1, theta: float = 0.5, phase: str = "quadratic") -> Weighted:
    """phase: "quadratic", or the paper's ablation "linear". It takes the place of rotary positions."""
    return Weighted(score=Phase(alpha, theta, phase), recipe=Recipe(rope=False))
