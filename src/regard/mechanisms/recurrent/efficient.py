"""Efficient attention: normalise queries over channels and keys over positions, then multiply keys and values first (id 270; Shen et al., 2018).

o = softmax_d(q) (softmax_n(k)^T v), rows of the implied matrix sum to one;   or norm="scaling": q (k^T v) / N, dot-product attention exactly
"""

import torch
from torch import Tensor

from ...algebra import FeatureMap, Recipe, Recurrent, identity
from ...catalog.registry import register
from ...errors import RegardError


def over_channels(q: Tensor) -> Tensor:
    return torch.softmax(q, -1)


def over_count(o: Tensor, n: Tensor) -> Tensor:
    return o / n


@register("efficient-attention")
def efficient_attention(norm: str = "softmax") -> Recurrent:
    """norm: "softmax" or "scaling". Under Causal() the softmax over positions runs up to each token. Each channel of softmax_n(k) is a
    map of the image: `regard.nn.EfficientAttention.maps`."""
    if norm not in ("softmax", "scaling"):
        raise RegardError(f"norm={norm!r}; expected softmax or scaling")
    if norm == "scaling":
        return Recurrent(readout=over_count, scaled=False, recipe=Recipe(rope=False))
    return Recurrent(FeatureMap(over_channels, identity), keys="softmax", scaled=False, recipe=Recipe(rope=False))
