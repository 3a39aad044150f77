"""SOFT: softmax-free attention, a Gaussian kernel in Nystrom form with a Newton inverse (id 12; Lu et al., 2022).

o = P A^+ P^T v,   P = exp(-|q_i - l_j|^2 / 2),  A = exp(-|l_i - l_j|^2 / 2),  q, k, landmarks scaled by D^(-1/4)
"""

from ...algebra import Nystrom
from ...catalog.registry import register


@register("soft")
def soft(landmarks: int = 49, iterations: int = 20, ridge: float | None = None, symmetric: bool = False) -> Nystrom:
    """landmarks: tokens q is pooled to when the input `landmarks` (B, H, m, D) is not given; use q = k as the paper does.
    ridge: added to A's diagonal (released code: 0.01, and none with symmetric). symmetric: SOFT++'s D^-1/2 A^+ D^-1/2, per sample."""
    if ridge is None:
        ridge = 0.0 if symmetric else 0.01
    return Nystrom(landmarks, iterations, ridge, symmetric)
