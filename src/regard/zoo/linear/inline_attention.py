"""InLine attention: linear attention normalised by subtraction, which keeps queries apart (id 19; Han et al., 2024).

W_ij = c phi(q_i).phi(k_j) - mean_s c phi(q_i).phi(k_s) + 1/N,   c = D^-1/2 / N;   o_i = sum_j W_ij v_j
"""

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Mechanism, Recipe, Recurrent, elu_plus_one, identity
from regard.algebra.part import bind
from regard.catalog.registry import register
from regard.engine import weights
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


def injectivity(mechanism: str | Mechanism, q: Tensor, other: Tensor, k: Tensor) -> float:
    """The least distance of two queries' rows of weights over the distance of the queries, over pairs q_i, other_i (B, H, Lq, D) that read
    the keys k (B, H, Lk, D): zero where different queries get the same weights."""
    rows = [weights(x, k, mechanism) for x in (q, other)]
    if rows[0] is None or rows[1] is None:
        raise RegardError(f"mechanism={mechanism!r} has no matrix of weights; expected one that `regard.weights` gives rows of")
    return float(((rows[0] - rows[1]).norm(dim=-1) / (q - other).norm(dim=-1)).min())
