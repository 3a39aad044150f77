"""TaylorShift: softmax by its second Taylor polynomial, in quadratic or linear time (id 55; Nauen et al., 2024).

p_ij = T(x_ij) / sum_j T(x_ij),   T(x) = a x^2 + b x + c,   x_ij = tau_h cos(q_i, k_j)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Dot, FeatureMap, Input, Learned, Recurrent, RowLocal, Weighted, bind, identity
from ...catalog.registry import register
from ...errors import RegardError


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
def taylorshift(
    mode: str = "efficient", a: float = 0.5, b: float = 1.0, c: float = 1.0, normalize: bool = True
) -> Recurrent | Weighted:
    """mode: "efficient", O(L D^3) through a state of 1 + D + D^2 rows, or "direct", O(L^2 D); both give the same numbers. Input `tau` (H,),
    learned from 1. normalize: q and k of unit length; without it x_ij = tau_h q_i.k_j. The polynomial must be positive: c > b^2 / (4 a). `regard.nn.TaylorShiftAttention` switches at `crossover`."""
    if a <= 0 or c < b * b / (4 * a):
        raise RegardError(f"a={a}, b={b}, c={c}: expected a > 0 and c >= b^2 / (4 a), so that weights are positive")
    spec = Input("tau", "h", default=1.0, layer=Learned(1.0))
    if mode == "efficient":
        known = {"a": a, "b": b, "c": c}
        feature = FeatureMap(bind(weighted_powers, **known), powers, (spec,), kernel=bind(kernel, **known), before=(tempered, unit) if normalize else (scaled_by, identity))
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
