"""MALA: magnitude-aware linear attention, an offset and a factor instead of a division (id 6; Fan et al., 2025).

w_ij = (1 + 1/z_i) s phi(q_i).phi(k_j) / N - z_i / N,   z_i = mean_j s phi(q_i).phi(k_j),   phi = elu + 1, s = D^-1/2;  rows sum to one
"""

from torch import Tensor

from regard.algebra import FeatureMap, Recipe, Recurrent, bind, elu_plus_one
from regard.algebra.position import grid_rotary
from regard.catalog.registry import register


def scaled_elu(x: Tensor) -> Tensor:
    return elu_plus_one(x) * x.shape[-1] ** -0.5


def magnitude_aware(o: Tensor, mass: Tensor, mean: Tensor, n: Tensor, eps: float) -> Tensor:
    z = mass / n
    return (1 + 1 / (z + eps)) * o / n - z * mean


@register("mala")
def mala(grid_width: int | None = None, eps: float = 1e-6) -> Recurrent:
    """grid_width: tokens are an image this wide, whose features are turned by a rotary embedding of two dimensions in the numerator
    (None: no positions). Under Causal() sums run up to each token. The paper's block: `regard.nn.GridAttention`."""
    return Recurrent(
        FeatureMap(scaled_elu, elu_plus_one),
        readout=bind(magnitude_aware, eps=eps),
        turn=None if grid_width is None else bind(grid_rotary, width=grid_width),
        scaled=False,
        recipe=Recipe(rope=False),
    )
