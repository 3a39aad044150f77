"""cosFormer: ReLU features re-weighted by a cosine of relative position (id 25; Qin et al., 2022).

o_i = sum_j w_ij v_j / max(sum_j w_ij, eps),   w_ij = relu(q_i).relu(k_j) cos(pi/2 (i - j) / m)
"""

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Input, Learned, Recipe, Recurrent, Sizes, bind, elu_plus_one
from regard.algebra.feature_map import cosine_reweighted
from regard.catalog.registry import register
from regard.errors import RegardError


def longest(sizes: Sizes) -> Tensor:
    """m = max(Lq, Lk), as in the paper; a stream must fix it in advance."""
    return torch.tensor(float(max(sizes.q_len, sizes.k_len)))


@register("cosformer")
def cosformer(horizon: float | None = None, feature: str = "relu", eps: float = 1e-6) -> Recurrent:
    """horizon: m, at least the longest length met; None: max(Lq, Lk) of the call, of a layer its context_len
    (input `horizon`). feature: "relu" or "elu+1"."""
    bases = {"relu": torch.relu, "elu+1": elu_plus_one}
    if feature not in bases:
        raise RegardError(f"feature={feature!r}; expected one of {', '.join(bases)}")
    spec = Input(
        "horizon",
        "",
        default=longest if horizon is None else horizon,
        layer=Learned(longest if horizon is None else horizon, trainable=False),
    )
    return Recurrent(
        FeatureMap(bind(cosine_reweighted, base=bases[feature]), inputs=(spec,)),
        readout="sum",
        eps=eps,
        scaled=False,
        recipe=Recipe(rope=False),
    )
