"""Attention as a local regression of values on keys."""

from __future__ import annotations

from dataclasses import field

from ..errors import RegardError
from .mechanism import Mechanism, Recipe
from .part import Input, described


@described
class LocalLinear(Mechanism):
    """o_i is the value at q_i of the line fitted to (k_j, v_j), weighed by w_ij: min_{b, W} 1/2 sum_j w_ij |v_j - b - W (k_j - q_i)|^2 + ridge/2 |W|^2.

    kernel: "dot": w = exp(scale q.k) over the row's largest, or "rbf": exp(-|k - q|^2 / 2 width^2). ridge: in units of these weights.
    solver: "cg": conjugate gradients, `iterations` at most, in O(Lq Lk D) without any Lq x Lk x D tensor; "direct": D x D systems.
    block: queries worked on at once.
    """

    ridge: float = 1e-2
    kernel: str = "dot"
    width: float = 1.0
    solver: str = "cg"
    iterations: int = 16
    block: int = 128
    inputs: tuple[Input, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel not in ("dot", "rbf") or self.solver not in ("cg", "direct"):
            raise RegardError(f"LocalLinear(kernel={self.kernel!r}, solver={self.solver!r}): expected dot or rbf, and cg or direct")
        if not (self.ridge > 0 and self.width > 0 and self.iterations >= 1 and self.block >= 1):
            raise RegardError(
                f"LocalLinear(ridge={self.ridge}, width={self.width}, iterations={self.iterations}, block={self.block}): expected positive numbers"
            )
