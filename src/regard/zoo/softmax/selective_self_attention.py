"""Selective self-attention: a temperature for every query and every value (id 27; Zhang et al., 2024).

o_i = sum_j softmax_j(tau^q_i s_ij) tau^v_j v_j,   tau^q_i = tanh(w_q . gelu(q_i)) + 1 + sigmoid(a_h) log n_i,   tau^v_j likewise
"""

import torch
from torch import Tensor

from regard.algebra import Dot, Headwise, Input, Learned, Weighted
from regard.algebra.part import Function
from regard.catalog.registry import register
from regard.errors import RegardError


def temperature(n: Tensor, tau_query: Tensor, tau_rate: Tensor) -> Tensor:
    return tau_query + 1 + tau_rate * torch.log(n.clamp_min(1))


def tempered_values(v: Tensor, tau_value: Tensor) -> Tensor:
    return v * tau_value


def one_plus_tanh(x: Tensor) -> Tensor:
    return 1 + torch.tanh(x)


def vanishing(beta: Tensor) -> Tensor:
    """exp(-exp(beta)): 6e-4 at beta = 2, so that a converted model starts where it was."""
    return torch.exp(-torch.exp(beta))


@register("selective-self-attention")
def selective_self_attention(tokens: bool = True, squash: str = "sigmoid", init: float | None = None) -> Weighted:
    """Inputs: `tau_query` (B, H, Lq), added to the position's part; `tau_rate` (H,), the factor of log n; `tau_value` (B, Hkv, Lk).

    The layer reads tau_query and tau_value off q and v by one vector a head, shared weights that start at 0 (tokens=False: position
    alone, as the released fine-tuning code). squash: "sigmoid" of a learned a, or "vanishing", exp(-exp(a)); init: its start (0, or 2).
    """
    squashes: dict[str, tuple[Function, float]] = {"sigmoid": (torch.sigmoid, 0.0), "vanishing": (vanishing, 2.0)}
    if squash not in squashes:
        raise RegardError(f"squash={squash!r}; expected sigmoid or vanishing")
    function, start = squashes[squash]
    rate = Input("tau_rate", "h", default=0.0, layer=Learned(start if init is None else init, function))
    query = Input("tau_query", "bhq", default=0.0, layer=Headwise("q", torch.tanh) if tokens else None)
    value = Input("tau_value", "bgk", default=1.0, layer=Headwise("v", one_plus_tanh) if tokens else None)
    return Weighted(score=Dot(temperature, (query, rate)), values=tempered_values if tokens else None, inputs=(value,) if tokens else ())
