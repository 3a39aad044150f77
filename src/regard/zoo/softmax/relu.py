"""Pointwise attention divided by length: ReLU/L and its kin (id 50; Wortsman et al., 2023).

p_ij = n_i^(-alpha) phi(s_ij),   n_i = number of visible keys (the length L without a mask)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Recipe, RowLocal, Weighted, bind, identity
from regard.catalog.registry import register
from regard.errors import RegardError, nearest


def relu_squared(s: Tensor) -> Tensor:
    return torch.relu(s) ** 2


PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": relu_squared,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "identity": identity,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
}


def length_power(total: Tensor, n: Tensor, alpha: float) -> Tensor:
    return n**alpha


@register("relu")
def relu(phi: str = "relu", alpha: float = 1.0, qk_norm: str = "") -> Weighted:
    """phi: relu, relu2, gelu, softplus, identity, relu6 or sigmoid. alpha: the power of the length. qk_norm: "layer" as in the paper's ViTs."""
    if phi not in PHI:
        raise RegardError(f"phi={phi!r}; expected one of {', '.join(PHI)}.{nearest(phi, PHI)}")
    return Weighted(normalizer=RowLocal(PHI[phi], divide=bind(length_power, alpha=alpha)), recipe=Recipe(qk_norm=qk_norm))
