"""DeltaNet: the state is corrected by the error of its own prediction, in chunks by the WY form (id 164; Yang et al., 2024).

S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,   o_t = S_t^T q_t / sqrt(D);   layers give unit-length k
"""

import torch
from torch import Tensor

from regard.algebra import Input, Projected, Recipe, Recurrent, bind
from regard.algebra.gates import log_gate
from regard.catalog.registry import register


def twice_sigmoid(x: Tensor) -> Tensor:
    return 2 * torch.sigmoid(x)


@register("deltanet")
def deltanet(
    negative_eigenvalues: bool = False,
    short_conv: int = 4,
    conv_bias: bool = False,
    activation: str = "silu",
    qk_norm: str = "l2",
    out_gate: str = "",
    key_dim: int | float | None = None,
    norm_eps: float = 1e-5,
) -> Recurrent:
    """negative_eigenvalues: beta in (0, 2) instead of (0, 1). Of the layer: short_conv: width of the convolutions on q, k, v (0: none), with
    conv_bias; activation of q and k ("silu", "relu", "elu+1" or ""; v always has silu); qk_norm "l2" (eps 1e-6) or "sum"; out_gate "silu" or
    none; key_dim: channels of q and k a head (a number, or a share of head_dim). Input `beta` (B, H, L). attend takes q and k as they are:
    normalise k to unit length for a contraction."""
    gate = Projected(twice_sigmoid if negative_eigenvalues else torch.sigmoid)
    recipe = Recipe(
        short_conv=short_conv,
        conv_bias=conv_bias,
        activation=activation,
        value_activation="silu",
        qk_norm=qk_norm,
        qk_eps=1e-6,
        out_norm="rms",
        norm_eps=norm_eps,
        out_gate=out_gate,
        key_dim=key_dim,
        rope=False,
    )
    return Recurrent(write="delta", inputs=(Input("beta", "bhk", layer=gate),), recipe=recipe)


def gated_deltanet(short_conv: int = 4, tau: float = 16.0) -> Recurrent:
    """Gated DeltaNet: the delta rule on a state that fades, S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T (Yang et al., 2024).
    Inputs `log_decay` (B, H, L) <= 0 and `beta` (B, H, L)."""
    return Recurrent(
        decay="token",
        write="delta",
        inputs=(
            Input("log_decay", "bhk", layer=Projected(bind(log_gate, tau=tau), bias=2.0)),
            Input("beta", "bhk", layer=Projected(torch.sigmoid)),
        ),
        recipe=Recipe(
            short_conv=short_conv,
            activation="silu",
            value_activation="silu",
            qk_norm="l2",
            qk_eps=1e-6,
            out_norm="rms",
            norm_eps=1e-5,
            out_gate="silu",
            rope=False,
        ),
    )
