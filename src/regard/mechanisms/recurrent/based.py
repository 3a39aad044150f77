"""Based: linear attention with the second-order Taylor map of exp, in a small feature dimension (id 163; Arora et al., 2024).

    phi(q).phi(k) = 1 + s + s^2/2,  s = q.k / sqrt(D'),  D' = 16;   o_t = phi(q_t) S_t / (phi(q_t).z_t)
The model around it mixes these layers with sliding-window softmax and gated short convolutions: `regard.nn.based_mixers`.
"""

from ...algebra import Causal, FeatureMap, Recipe, Recurrent, Weighted, Window, taylor
from ...algebra.feature_map import taylor_kernel, taylor_packed
from ...catalog.registry import register


@register("based")
def based(feature_dim: int = 16, packed: bool = False, eps: float = 1e-12, divide: str = "sum") -> Recurrent:
    """feature_dim: channels of q and k a head in the layer; the state is 1 + D' + D'^2 wide ((D'+1)(D'+2)/2 if packed). divide: "sum" by the
    sum, at least eps, as the layer; "add" by the sum plus eps, as the functional form; "none"."""
    return Recurrent(
        FeatureMap(taylor_packed if packed else taylor, kernel=taylor_kernel),
        readout=divide,
        eps=eps,
        scaled=False,
        recipe=Recipe(rope=False, key_dim=feature_dim),
    )


def based_window(window: int = 64) -> Weighted:
    """The exact sliding-window partner."""
    return Weighted(mask=Causal() & Window(window))
