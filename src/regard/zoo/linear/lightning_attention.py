"""Lightning Attention, first version, and its layer in TNL: the recurrence of the second with other slopes (id 80; Qin et al., 2024).

S_t = e^{-s_h} S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   s_h = 2^(-8 h / H) (1 - layer / (layers - 1) + 1e-5)
"""

from dataclasses import replace

from regard.algebra import Recipe, Recurrent
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.zoo.linear.lightning_attention_2 import lightning


@register("lightning-attention")
def lightning_attention(layer: int = 0, layers: int = 1, gate_rank: int | None = None, norm: str = "srms") -> Recurrent:
    """The first Lightning Attention and its TNL layer (id 80; Qin et al., 2024): the same recurrence with slopes 2^(-8 h / H) (1 - layer /
    (layers - 1) + 1e-5), q, k and v through silu, a norm over all heads ("srms" without learned factors, eps 1e-6, as the released models;
    the paper's example module has "layer", eps 1e-5), and a sigmoid gate of gate_rank (the paper's: the head dimension).
    `lightning_blocks` is the operator with a state."""
    if not 0 <= layer < layers:
        raise RegardError(f"layer={layer}, layers={layers}: expected 0 <= layer < layers")
    base = lightning(layer_share(layer, layers))
    recipe = Recipe(activation="silu", value_activation="silu", merge_norm=norm, out_gate="sigmoid", gate_rank=gate_rank, rope=False)
    return replace(base, recipe=recipe)


def layer_share(layer: int, layers: int) -> float:
    """What the released models take off a layer's slopes: layer / (layers - 1) - 1e-5."""
    return layer / max(layers - 1, 1) - 1e-5
