"""TaylorShift: softmax by its second Taylor polynomial, in quadratic or linear time (id 55; Nauen et al., 2024).

p_ij = T(x_ij) / sum_j T(x_ij),   T(x) = a x^2 + b x + c,   x_ij = tau_h cos(q_i, k_j)

A classifier of long sequences: `regard.nn.SequenceClassifier([TaylorShiftAttention(dim, heads), ...], classes=...)`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Dot, FeatureMap, Input, Learned, Mask, Recurrent, RowLocal, Segments, Weighted, bind, identity
from regard.algebra.mask import conjuncts
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.given import given_mask
from regard.engine.problem import keys_in_sight
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.parts import whole


def powers(x: Tensor) -> Tensor:
    """[1, x, vec(x x^T)]."""
    return torch.cat((torch.ones_like(x[..., :1]), x, (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)), -1)


def weighted_powers(x: Tensor, a: float, b: float, c: float) -> Tensor:
    d = x.shape[-1]
    return powers(x) * torch.cat([x.new_full((size,), value) for size, value in ((1, c), (d, b), (d * d, a))])


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def tempered(x: Tensor, tau: Tensor) -> Tensor:
    return scaled_by(unit(x), tau)


def scaled_by(x: Tensor, tau: Tensor) -> Tensor:
    return x * tau.to(x.dtype)[:, None, None]


def kernel(s: Tensor, d: int, a: float, b: float, c: float) -> Tensor:
    return a * s * s + b * s + c


def polynomial(s: Tensor, a: float, b: float, const: float) -> Tensor:
    return a * s * s + b * s + const


def temperature(n: Tensor, tau: Tensor) -> Tensor:
    return tau


@register("taylorshift")
def taylorshift(mode: str = "efficient", a: float = 0.5, b: float = 1.0, c: float = 1.0, normalize: bool = True) -> Recurrent | Weighted:
    """mode: "efficient", O(L D^3) through a state of 1 + D + D^2 rows, or "direct", O(L^2 D); both give the same numbers. Input `tau` (H,),
    learned from 1. normalize: q and k of unit length; without it x_ij = tau_h q_i.k_j. The polynomial must be positive: c > b^2 / (4 a). `regard.nn.TaylorShiftAttention` switches at `crossover`."""
    if a <= 0 or c < b * b / (4 * a):
        raise RegardError(f"a={a}, b={b}, c={c}: expected a > 0 and c >= b^2 / (4 a), so that weights are positive")
    spec = Input("tau", "h", default=1.0, layer=Learned(1.0))
    if mode == "efficient":
        known = {"a": a, "b": b, "c": c}
        feature = FeatureMap(
            bind(weighted_powers, **known),
            powers,
            (spec,),
            kernel=bind(kernel, **known),
            before=(tempered, unit) if normalize else (scaled_by, identity),
        )
        return Recurrent(feature, readout="sum", eps=0.0, scaled=False)
    if mode == "direct":
        weight = bind(polynomial, a=a, b=b, const=c)
        return Weighted(score=Dot(temperature, (spec,), power=0.0, unit=normalize), normalizer=RowLocal(weight, weight))
    raise RegardError(f"mode={mode!r}; expected efficient or direct")


def crossover(head_dim: int) -> int:
    """The length from which the efficient form needs fewer operations: N0 = D^2 + D + 1."""
    return head_dim**2 + head_dim + 1


def crossover_memory(head_dim: int) -> float:
    """About the length from which the efficient form needs less memory: D^2 / 2 + 2 D + 1/2, lower-order terms left out."""
    return head_dim**2 / 2 + 2 * head_dim + 0.5


class TaylorShiftAttention(Attention):
    """x (B, L, dim) -> (B, L, dim), both forms equal. mode: "auto" (efficient from L = D^2 + D + 1 on), "direct" or "efficient".

    a, b, c: the polynomial's coefficients. output_scale: multiply outputs by sqrt(L / D), which keeps their size as L grows; L counts the keys that
    some query sees, without padding. Packed documents, each of a length of its own, are refused with it.
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
        self.key_count: int | Tensor = 1  # of the last call, where outputs are scaled by it

    def form(self, length: int) -> str:
        """Which form a call of this length takes."""
        return self.mode if self.mode != "auto" else "efficient" if length >= crossover(self.key_dim) else "direct"

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Any = None, **inputs: Any) -> Tensor:
        length = x.shape[1] if context is None else context.shape[1]
        self.mechanism = self.forms[self.form(length)]
        self.key_count = self.counted(mask, inputs, length) if self.output_scale else 1
        return super().forward(x, context, mask, **inputs)

    def counted(self, mask: Any, inputs: dict[str, Any], length: int) -> int | Tensor:
        """How many keys some query of a sample sees: a number, or (B or 1, 1, 1, 1)."""
        if isinstance(mask, Tensor):
            _, mask, inputs = given_mask(self.mechanism, mask, inputs)
        if mask is None:
            return length
        if any(isinstance(part, Segments) for part in conjuncts(mask)):
            raise RegardError(
                "packed documents with output_scale=True: each would need its own length; build the layer with output_scale=False"
            )
        seen = keys_in_sight(mask, inputs)
        return length if seen is None or seen.shape[-1] == 1 else seen.sum(-1)[:, None, None, None]

    def close(self, o: Tensor, x: Tensor) -> Tensor:
        if not self.output_scale:
            return super().close(o, x)
        count = self.key_count
        count = count.to(torch.promote_types(o.dtype, torch.float32)) if isinstance(count, Tensor) else count
        return super().close((o * (count / self.key_dim) ** 0.5).to(o.dtype), x)

    @whole
    def step(self, x: Tensor, state: Any = None, mask: Mask | None = None, **inputs: Any) -> Any:
        if self.output_scale:
            raise RegardError("step with output_scale=True: the scale depends on the final length; build the layer with output_scale=False")
        self.mechanism = self.forms["efficient"]
        return super().step(x, state, mask, **inputs)
