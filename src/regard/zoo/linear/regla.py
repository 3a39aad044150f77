"""ReGLA: gated linear attention with safe exponentials, a variance factor, and a gate refined by another (id 35; Lu et al., 2025).

phi_q(q) = exp(q - max_d q), phi_k(k_t) = exp(k_t - max_{s <= t, d} k_s);   S_t = G_t S_{t-1} + phi_k(k_t) v_t^T,   o_t = a phi_q(q_t) S_t
G = (1 - r) g^2 + r (1 - (1 - g)^2),   a = 1 / (e sqrt(m (e^2 - 1)))
Pretrained layers, all of a model or half of them, become layers of it by `regard.adapt.convert(model, "regla", layers=[...])`, then trained.
"""

import math

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Input, Projected, Recipe, Recurrent, bind, identity
from regard.catalog.registry import register


def safe_query(q: Tensor, scaled: bool) -> Tensor:
    """exp(q - max), times what gives sum_d exp(q + k) unit variance for normal q and k."""
    factor = 1 / (math.e * math.sqrt(q.shape[-1] * (math.e**2 - 1))) if scaled else 1.0
    return torch.exp(q - q.amax(-1, keepdim=True).detach()) * factor


def refined(g: Tensor, r: Tensor) -> Tensor:
    """(1 - r) g^2 + r (1 - (1 - g)^2), from g^2 (r = 0) over g (r = 1/2) to 2 g - g^2 (r = 1)."""
    return (1 - r) * g * g + r * (1 - (1 - g) ** 2)


def log_refined(x: Tensor) -> Tensor:
    """The log of the refined gate of two logits side by side: log g + log(g + 2 r (1 - g))."""
    a, b = x.chunk(2, -1)
    g, r = torch.sigmoid(a), torch.sigmoid(b)
    # Rounding may leave the sum of both logs a little above zero where the gate is open.
    return (torch.nn.functional.logsigmoid(a) + torch.log(g + 2 * r * torch.sigmoid(-a))).clamp_max(0)


@register("regla")
def regla(rank: int | None = 16, bias: float = 3.0, scaled: bool = True) -> Recurrent:
    """rank, bias: of the projection of both gates in the layer. scaled: multiply by a. Input `log_decay` (B, H, L, D): log G. The largest
    key so far, in place of the sequence's, keeps it causal; the layer's RMS norm takes out the factor between them."""
    gate = Projected(log_refined, rank=rank, bias=bias, times=2)
    return Recurrent(
        FeatureMap(bind(safe_query, scaled=scaled), identity),
        decay="channel",
        keys="max",
        scaled=False,
        inputs=(Input("log_decay", "bhkd", layer=gate),),
        recipe=Recipe(out_norm="rms", rope=False),
    )
