"""Galerkin and Fourier attention: no softmax, sums over points as integrals (id 69; Cao, 2021).

galerkin: o = q (k^T v) / n;   fourier: o = (q k^T / sqrt(D)) v / n;   linear: softmax_d(q) (softmax_n(k)^T v) / n
"""

from torch import Tensor

from ...algebra import FeatureMap, Recipe, Recurrent, RowLocal, Weighted, identity
from ...catalog.registry import register
from ...errors import RegardError
from .efficient import over_channels, over_count


def integral(s: Tensor, n: Tensor) -> Tensor:
    return s / n


@register("galerkin")
def galerkin(kind: str = "galerkin") -> Recurrent | Weighted:
    """kind: "galerkin", "fourier" or "linear". The norms of K and V (or Q and K), the coordinates and the start of the projections belong to
    `regard.nn.OperatorAttention`."""
    if kind not in ("galerkin", "fourier", "linear"):
        raise RegardError(f"kind={kind!r}; expected galerkin, fourier or linear")
    recipe = Recipe(rope=False)
    if kind == "fourier":
        return Weighted(normalizer=RowLocal(integral), recipe=recipe)
    if kind == "linear":
        return Recurrent(FeatureMap(over_channels, identity), keys="softmax", readout=over_count, scaled=False, recipe=recipe)
    return Recurrent(readout=over_count, scaled=False, recipe=recipe)
