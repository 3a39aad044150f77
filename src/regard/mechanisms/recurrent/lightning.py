"""Lightning Attention-2: causal linear attention with a fixed decay per head, in chunks (id 155; Qin et al., 2024).

S_t = e^{-s_h} S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t        (no 1/sqrt(D); layers normalise the output)
"""

from torch import Tensor

from ...algebra import Input, Learned, Recipe, Recurrent, Sizes, bind
from ...algebra.position import alibi_slopes
from ...catalog.registry import register


def minus_slopes(sizes: Sizes, layer_share: float = 0.0) -> Tensor:
    """-2^(-8 h / H) (1 - layer / layers): heads forget at geometric rates."""
    return -alibi_slopes(sizes) * (1 - layer_share)


@register("lightning-attention-2")
def lightning(layer_share: float = 0.0) -> Recurrent:
    """layer_share: layer / layers, which slows decay in deeper layers. The input `log_decay` (H,), <= 0, replaces the slopes; 0 is no decay."""
    slopes = bind(minus_slopes, layer_share=layer_share)
    spec = Input("log_decay", "h", default=slopes, layer=Learned(slopes, trainable=False))
    return Recurrent(
        decay="head", scaled=False, inputs=(spec,), recipe=Recipe(activation="silu", out_norm="rms", out_gate="silu", rope=False)
    )
