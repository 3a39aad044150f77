"""SLAB's simplified linear attention: ReLU features and a plain sum (id 197; Guo et al., 2024).

o_i = relu(q_i) (sum_j relu(k_j) v_j^T) / (relu(q_i).sum_j relu(k_j) + eps) (+ a depthwise convolution of v)
"""

import torch

from ...algebra import FeatureMap, Recipe, Recurrent, bind
from ...algebra.readouts import sum_divided
from ...catalog.registry import register


@register("slab")
def slab(eps: float = 1e-6) -> Recurrent:
    """The module with positions on keys and the convolution is `regard.nn.GridAttention`; its norm is `regard.nn.PRepBN`."""
    return Recurrent(FeatureMap(torch.relu), readout=bind(sum_divided, eps=eps), scaled=False, recipe=Recipe(rope=False))
