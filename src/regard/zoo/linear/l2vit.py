"""L2ViT's linear global attention: ReLU features, a divisor clamped from below, a temperature a head (id 33; Zheng, 2025).

o_i = tau_h relu(q_i) (sum_j relu(k_j) v_j^T) / max(relu(q_i).sum_j relu(k_j), 100)
"""

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Input, Learned, Recipe, Recurrent, Sizes, bind
from regard.catalog.registry import register


def inverse_root(sizes: Sizes) -> Tensor:
    return torch.full((sizes.heads,), sizes.head_dim**-0.5, dtype=torch.float64)


def clamped(o: Tensor, mass: Tensor, tau: Tensor, floor: float) -> Tensor:
    return tau[:, None, None] * o / mass.clamp_min(floor)


@register("l2vit")
def l2vit(floor: float = 100.0) -> Recurrent:
    """floor: the smallest divisor. Input `tau` (H,), by default D^-1/2; rows of weights sum to at most tau. The blocks with window
    attention and local concentration: `regard.nn.GridBlock` ("window" and "l2vit", concentration=True)."""
    tau = Input("tau", "h", default=inverse_root, layer=Learned(inverse_root))
    return Recurrent(FeatureMap(torch.relu), readout=bind(clamped, floor=floor), scaled=False, inputs=(tau,), recipe=Recipe(rope=False))
