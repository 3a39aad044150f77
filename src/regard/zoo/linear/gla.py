"""Gated linear attention: a gate per key channel, computed from the input (id 171; Yang et al., 2023).

S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(D),   alpha_t = sigmoid(x_t W1 W2 + b)^(1/tau)
"""

from regard.algebra import Input, Projected, Recipe, Recurrent, bind
from regard.algebra.gates import log_gate
from regard.catalog.registry import register


@register("gla")
def gla(
    gate_rank: int = 16,
    tau: float = 16.0,
    key_dim: int | float | None = 0.5,
    gate_bias: float = 0.0,
    clamp_min: float | None = None,
    norm_eps: float = 1e-5,
    short_conv: int = 0,
) -> Recurrent:
    """gate_rank: rank of W1 W2. tau: temperature of the gate. clamp_min: the smallest log gate. key_dim: channels of q and k a head (0.5:
    half the layer's head_dim). norm_eps: of the norm a head. short_conv: width of convolutions with silu on q, k, v (0: none).
    Input `log_decay` (B, H, L, D), <= 0; the layer makes one a key head."""
    gate = Projected(bind(log_gate, tau=tau, low=clamp_min), rank=gate_rank, bias=gate_bias, grouped=True)
    recipe = Recipe(
        short_conv=short_conv, conv_activation="silu", out_norm="rms", norm_eps=norm_eps, out_gate="silu", rope=False, key_dim=key_dim
    )
    return Recurrent(decay="channel", inputs=(Input("log_decay", "bhkd", layer=gate),), recipe=recipe)
