"""SOFT: softmax-free attention, a Gaussian kernel in Nystrom form with a Newton inverse (id 12; Lu et al., 2022).

o = P A^+ P^T v,   P = exp(-|q_i - l_j|^2 / 2),  A = exp(-|l_i - l_j|^2 / 2),  q, k, landmarks scaled by D^(-1/4)
"""

from ...algebra import Nystrom
from ...catalog.registry import register
from ...errors import RegardError


@register("soft")
def soft(
    landmarks: int = 49, iterations: int = 20, ridge: float | None = None, symmetric: bool = False, mode: str | None = None
) -> Nystrom:
    """landmarks: tokens q is pooled to when the input `landmarks` (B, H, m, D), scaled as q is, is not given; use q = k as the paper does.

    mode: "newton": A + ridge I inverted by `iterations` steps, ridge 0.01 as released; "exact": A^-1; "symmetric" (or symmetric=True):
    SOFT++'s D^-1/2 A^+ D^-1/2, D = diag(A 1), without ridge, from 2 A / (largest row sum of a sample and head)^2, with the gradient of the
    inverse; "released": the same from one factor over the whole batch, halved until I - a A A is small, with the gradient of the steps.
    """
    mode = ("symmetric" if symmetric else "newton") if mode is None else mode
    if mode not in ("newton", "exact", "symmetric", "released") or (symmetric and mode not in ("symmetric", "released")):
        raise RegardError(f"mode={mode!r}, symmetric={symmetric}; expected newton, exact, symmetric or released")
    ridge = (0.01 if mode == "newton" else 0.0) if ridge is None else ridge
    return Nystrom(landmarks, iterations, ridge, mode in ("symmetric", "released"), mode)
