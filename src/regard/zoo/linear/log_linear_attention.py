"""Log-linear attention: a state for each span of the past, spans doubling with age, mixed by data-dependent scales (id 60; Guo et al., 2025).

o_t = sum_l lambda_t^(l) q_t S_t^(l),   S_t^(l) = sum_{j: bit_length(t xor j) = l} (prod_{j < u <= t} C_u) k_j v_j^T
C_u = a_u (Mamba-2) or a_u (I - beta_u k_u k_u^T) (gated delta rule)
"""

import torch
import torch.nn.functional as F

from regard.algebra import Input, LogLinear, Projected, Recipe, Recurrent, bind
from regard.algebra.gates import log_gate
from regard.catalog.registry import register
from regard.errors import RegardError


@register("log-linear-attention")
def log_linear(base: str = "mamba2", levels: int = 18, tau: float = 16.0, short_conv: int = 4) -> LogLinear:
    """base: "mamba2" or "gated-delta". levels: how many the layer makes scales for, at least ceil(log2 L) + 1. tau: temperature of the layer's
    decay gate. Inputs `log_decay` (B, H, L) <= 0, `level_scales` (B, H, L, levels) (the layer: softplus of a projection), and `beta`
    (B, H, L) for the delta rule; any other base: `LogLinear(inner, ...)`. Keys are used as they are."""
    decay = Input("log_decay", "bhk", layer=Projected(bind(log_gate, tau=tau), bias=2.0))
    if base == "mamba2":
        inner = Recurrent(decay="token", scaled=False, inputs=(decay,))
    elif base == "gated-delta":
        inner = Recurrent(decay="token", write="delta", scaled=False, inputs=(decay, Input("beta", "bhk", layer=Projected(torch.sigmoid))))
    else:
        raise RegardError(f"base={base!r}; expected mamba2 or gated-delta")
    scales = Input("level_scales", "bhkf", layer=Projected(F.softplus, channels=levels, bias=0.5))
    recipe = Recipe(
        short_conv=short_conv,
        activation="silu",
        value_activation="silu",
        qk_norm="l2",
        qk_eps=1e-6,
        out_norm="rms",
        norm_eps=1e-5,
        out_gate="silu",
        rope=False,
    )
    return LogLinear(inner, (scales,), recipe)
