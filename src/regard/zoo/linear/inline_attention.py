"""InLine attention: linear attention normalised by subtraction, which keeps queries apart (id 19; Han et al., 2024).

W_ij = c phi(q_i).phi(k_j) - mean_s c phi(q_i).phi(k_s) + 1/N,   c = D^-1/2 / N;   o_i = sum_j W_ij v_j
"""

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Recipe, Recurrent, elu_plus_one, identity
from regard.algebra.part import bind
from regard.catalog.registry import register
from regard.errors import RegardError

MAPS = {"identity": identity, "relu": torch.relu, "elu+1": elu_plus_one, "exp": torch.exp}


def scaled_map(x: Tensor, feature: str, temperature: float) -> Tensor:
    return MAPS[feature](x * temperature) * x.shape[-1] ** -0.5  # type: ignore[no-any-return]


def plain_map(x: Tensor, feature: str, temperature: float) -> Tensor:
    return MAPS[feature](x * temperature)  # type: ignore[no-any-return]


def injective(o: Tensor, mass: Tensor, mean: Tensor, n: Tensor) -> Tensor:
    return o / n + (1 - mass / n) * mean


@register("inline-attention")
def inline_attention(feature: str = "identity", temperature: float | None = None) -> Recurrent:
    """feature: phi, "identity", "relu", "elu+1" or "exp", of x times temperature (None: 0.2 for "exp", as released, else 1). Rows sum to one, entries may be negative, nothing is divided by. The paper's
    module with its local residual: `regard.nn.GridAttention`."""
    if feature not in MAPS:
        raise RegardError(f"feature={feature!r}; expected one of {', '.join(MAPS)}")
    known = {"feature": feature, "temperature": (0.2 if feature == "exp" else 1.0) if temperature is None else temperature}
    return Recurrent(
        FeatureMap(bind(scaled_map, **known), bind(plain_map, **known)), readout=injective, scaled=False, recipe=Recipe(rope=False)
    )
