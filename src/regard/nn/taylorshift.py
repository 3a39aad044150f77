"""TaylorShift as a layer that chooses between its quadratic and its linear form by length (Nauen et al., 2024; id 55)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..algebra import Mask
from ..catalog import get
from ..errors import RegardError
from ..mechanisms.recurrent.taylorshift import crossover
from .attention import Attention


class TaylorShiftAttention(Attention):
    """x (B, L, dim) -> (B, L, dim), both forms equal. mode: "auto" (efficient from L = D^2 + D + 1 on), "direct" or "efficient".

    a, b, c: the polynomial's coefficients. output_scale: multiply outputs by sqrt(L / D), which keeps their size as L grows.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        a: float = 0.5,
        b: float = 1.0,
        c: float = 1.0,
        mode: str = "auto",
        output_scale: bool = True,
        causal: bool = False,
        **options: Any,
    ):
        if mode not in ("auto", "direct", "efficient"):
            raise RegardError(f"mode={mode!r}; expected auto, direct or efficient")
        self.forms = {form: get("taylorshift", mode=form, a=a, b=b, c=c) for form in ("direct", "efficient")}
        super().__init__(dim, heads, self.forms["efficient"], causal=causal, **options)
        self.mode, self.output_scale = mode, output_scale

    def form(self, length: int) -> str:
        """Which form a call of this length takes."""
        return self.mode if self.mode != "auto" else "efficient" if length >= crossover(self.key_dim) else "direct"

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Any = None, **inputs: Any) -> Tensor:
        length = x.shape[1] if context is None else context.shape[1]
        self.mechanism = self.forms[self.form(length)]
        return super().forward(x, context, mask, **inputs)

    def close(self, o: Tensor, x: Tensor) -> Tensor:
        return super().close(o * (x.shape[1] / self.key_dim) ** 0.5 if self.output_scale else o, x)

    def step(self, x: Tensor, state: Any = None, mask: Mask | None = None, **inputs: Any) -> Any:
        if self.output_scale:
            raise RegardError("step with output_scale=True: the scale depends on the final length; build the layer with output_scale=False")
        self.mechanism = self.forms["efficient"]
        return super().step(x, state, mask, **inputs)
