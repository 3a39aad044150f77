"""The efficient-attention block: a plug-in for convolutional networks in place of a non-local block (id 270; Shen et al., 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import get
from ..engine import attend
from ..errors import RegardError


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
