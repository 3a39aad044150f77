"""Efficient attention: normalise queries over channels and keys over positions, then multiply keys and values first (id 270; Shen et al., 2018).

o = softmax_d(q) (softmax_n(k)^T v), rows of the implied matrix sum to one;   or norm="scaling": q (k^T v) / N, dot-product attention exactly
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import FeatureMap, Recipe, Recurrent, identity
from regard.algebra.feature_map import over_channels
from regard.algebra.readouts import over_count
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError


@register("efficient-attention")
def efficient_attention(norm: str = "softmax") -> Recurrent:
    """norm: "softmax" or "scaling". Under Causal() the softmax over positions runs up to each token. Each channel of softmax_n(k) is a
    map of the image: `regard.nn.EfficientAttention.maps`."""
    if norm not in ("softmax", "scaling"):
        raise RegardError(f"norm={norm!r}; expected softmax or scaling")
    if norm == "scaling":
        return Recurrent(readout=over_count, scaled=False, recipe=Recipe(rope=False))
    return Recurrent(FeatureMap(over_channels, identity), keys="softmax", scaled=False, recipe=Recipe(rope=False))


class EfficientAttention(nn.Module):
    """x (B, channels, H, W) -> the same shape: x + W_o concat_h softmax_d(q) (softmax_n(k)^T v), q, k, v by 1 x 1 convolutions.

    key_channels, value_channels: of all heads together. norm: "softmax" or "scaling". `maps(x)` shows where each key channel looks.
    """

    def __init__(self, channels: int, key_channels: int, heads: int, value_channels: int, norm: str = "softmax"):
        super().__init__()
        if key_channels % heads or value_channels % heads:
            raise RegardError(f"key_channels={key_channels}, value_channels={value_channels}: expected multiples of heads={heads}")
        self.heads, self.mechanism = heads, get("efficient-attention", norm=norm)
        self.q, self.k = nn.Conv2d(channels, key_channels, 1), nn.Conv2d(channels, key_channels, 1)
        self.v, self.out = nn.Conv2d(channels, value_channels, 1), nn.Conv2d(value_channels, channels, 1)

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(-1, -2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.tokens(layer(x)) for layer in (self.q, self.k, self.v))
        out = attend(q, k, v, self.mechanism)
        return x + self.out(out.transpose(-1, -2).flatten(1, 2).unflatten(-1, x.shape[2:]))  # type: ignore[no-any-return]

    @torch.no_grad()
    def maps(self, x: Tensor) -> Tensor:
        """(B, heads, channels, H, W): each key channel's weights over positions, which sum to one."""
        return self.tokens(self.k(x)).softmax(-2).transpose(-1, -2).unflatten(-1, x.shape[2:])
