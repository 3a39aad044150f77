"""Local linear attention: a line fitted to keys and values around every query, read at the query (id 54; Zuo et al., 2025).

o_i = b of min_{b, W} 1/2 sum_j w_ij |v_j - b - W (k_j - q_i)|^2 + ridge/2 |W|^2,  w_ij = exp(q_i.k_j / sqrt(D)) over the row's largest
Not built: a fused kernel (blocks run in PyTorch). Tasks: `regard.tasks.permutations`, `regard.tasks.recall`, regression in `regard.tasks.dynamics`.
"""

from regard.algebra import LocalLinear, Recipe
from regard.catalog.registry import register


@register("local-linear-attention")
def local_linear(
    ridge: float = 1e-2, solver: str = "cg", iterations: int = 16, kernel: str = "dot", width: float = 1.0, block: int = 128
) -> LocalLinear:
    """ridge: towards infinity softmax attention; with equal weights a global ridge regression. solver: "cg" (memory linear in length) or
    "direct". kernel: "dot" or "rbf" of `width`. Weights sum to one and may be negative. Decoding keeps keys and values. The layer
    normalises q and k by RMS."""
    return LocalLinear(ridge, kernel, width, solver, iterations, block, recipe=Recipe(qk_norm="rms"))
