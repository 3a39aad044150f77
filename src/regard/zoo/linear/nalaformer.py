"""NaLaFormer: the query's direction is sharpened by a power that grows with its norm (id 10; Meng et al., 2025).

phi(q) = [relu(q)^p, relu(-q)^p] / |q|^p,  p = 3 (1/2 + tanh |q|);   phi(k) = [relu(k^3), relu(-k^3)];   o_i = phi(q_i) S / (phi(q_i).mean phi(k) + eps)
"""

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Recipe, Recurrent, bind
from regard.algebra.position import grid_rotary
from regard.algebra.readouts import mean_divided
from regard.catalog.registry import register


def signed(x: Tensor) -> Tensor:
    """[relu(x), relu(-x)]: signs survive where all features are positive."""
    return torch.cat((x.relu(), (-x).relu()), -1)


def norm_aware(q: Tensor, power: float, offset: float) -> Tensor:
    # A zero query has no direction: its features, and their gradient, are zero.
    square = q.square().sum(-1, keepdim=True)
    norm = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    x = signed(q) / norm.clamp_min(1e-12)
    p = power * (offset + torch.tanh(norm))
    return torch.where(x > 0, torch.where(x > 0, x, 1.0) ** p, 0.0)


def signed_power(k: Tensor, power: int) -> Tensor:
    return signed(k**power)


def halves_rotary(x: Tensor, position: Tensor, width: int) -> Tensor:
    return torch.cat([grid_rotary(half, position, width) for half in x.chunk(2, -1)], -1)


@register("nalaformer")
def nalaformer(power: float = 3.0, offset: float = 0.5, key_power: int = 3, grid_width: int | None = None, eps: float = 1e-6) -> Recurrent:
    """power, offset: p = power (offset + tanh |q|). key_power: an odd power of the keys. grid_width: as of "mala", both halves of the
    features turned. Features are 2 D wide. The paper's block: `regard.nn.GridAttention`."""
    return Recurrent(
        FeatureMap(bind(norm_aware, power=power, offset=offset), bind(signed_power, power=key_power)),
        readout=bind(mean_divided, eps=eps),
        turn=None if grid_width is None else bind(halves_rotary, width=grid_width),
        scaled=False,
        recipe=Recipe(rope=False),
    )
