"""TransNormerLLM: linear attention with a decay a head and layer and relative positions by cosines (id 61; Qin et al., 2023).

o_t = sum_{s <= t} lambda^{t-s} (sum_c q_tc k_sc cos(theta_c (t - s))) v_s,   lambda = exp(-2^(-8 h / H) (1 - layer / (layers - 1) + 1e-5))
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Input, Learned, Mechanism, Recipe, Recurrent, Sizes
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.zoo.linear.lightning_attention import layer_share
from regard.zoo.linear.lightning_attention_2 import lightning


def angles(sizes: Sizes) -> Tensor:
    """10000^(-2 c / (H D)), c counting the channels of all heads."""
    width = sizes.heads * sizes.head_dim
    return (10000 ** (-2 / width * torch.arange(width, dtype=torch.float64))).view(sizes.heads, sizes.head_dim)


def cosines(x: Tensor, position: Tensor, theta: Tensor) -> Tensor:
    """[x cos(theta t), x sin(theta t)]: products are sum_c q_c k_c cos(theta_c (t - s))."""
    angle = position.to(torch.float64)[:, None] * theta.to(torch.float64)[:, None]
    return torch.cat((x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)), -1)


@register("transnormerllm")
def transnormerllm(layer: int = 0, layers: int = 1, positions: bool | None = None) -> Recurrent:
    """layer, layers: which of how many, for the decay: the first head forgets fastest, the last layer hardly at all. positions: whether q and
    k carry cosines (None: in layer 0 alone), with the learned input `theta` (H, D). The layer applies silu to q and k, a norm without
    learned factors over all heads, and the gate x U."""
    if not 0 <= layer < layers:
        raise RegardError(f"layer={layer}, layers={layers}: expected 0 <= layer < layers")
    base = replace(
        lightning(layer_share(layer, layers)), recipe=Recipe(activation="silu", merge_norm="srms", out_gate="linear", rope=False)
    )
    if not (layer == 0 if positions is None else positions):
        return base
    return replace(base, feature=FeatureMap(cosines, inputs=(Input("theta", "hd", default=angles, layer=Learned(angles)),)))


def transnormer_model(vocab: int, dim: int, layers: int, heads: int, **options: Any) -> Any:
    """TransNormerLLM as a `regard.nn.Decoder`: its layers, SimpleRMSNorm before each, and the gated linear unit without activation."""
    from regard.nn.decoder import Decoder

    mechanisms: list[Mechanism] = [transnormerllm(layer, layers) for layer in range(layers)]
    return Decoder(mechanisms, vocab=vocab, dim=dim, layers=layers, heads=heads, rope=False, norm="srms", mlp="sglu", **options)
