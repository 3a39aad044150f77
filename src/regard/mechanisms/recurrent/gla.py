"""Gated linear attention: a gate per key channel, computed from the input (id 171; Yang et al., 2023).

S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(D),   alpha_t = sigmoid(x_t W1 W2 + b)^(1/tau)
"""

import torch.nn.functional as F
from torch import Tensor

from ...algebra import Input, Projected, Recipe, Recurrent, bind
from ...catalog.registry import register


def log_gate(x: Tensor, tau: float) -> Tensor:
    return F.logsigmoid(x) / tau


@register("gla")
def gla(gate_rank: int = 16, tau: float = 16.0, key_dim: int | float | None = 0.5, gate_bias: float = 0.0) -> Recurrent:
    """gate_rank: rank of W1 W2. tau: temperature of the gate. key_dim: channels of q and k a head (0.5: half the layer's head_dim).
    Input `log_decay` (B, H, L, D), <= 0."""
    gate = Projected(bind(log_gate, tau=tau), rank=gate_rank, bias=gate_bias)
    return Recurrent(
        decay="channel",
        inputs=(Input("log_decay", "bhkd", layer=gate),),
        recipe=Recipe(out_norm="rms", out_gate="silu", rope=False, key_dim=key_dim),
    )
