"""Based's other mixers and its stack: Taylor linear attention, exact small windows, gated short convolutions (Arora et al., 2024)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import get
from ..mechanisms.recurrent.based import based_window
from .attention import Attention
from .parts import ShortConv


class GatedConv(nn.Module):
    """W_o(silu(conv3(x W1)) * (x W2)), a causal depthwise convolution of width 3 between two projections. bias: of the projections;
    conv_bias: of the convolution."""

    def __init__(self, dim: int, width: int = 3, expand: int = 1, bias: bool = False, conv_bias: bool = False):
        super().__init__()
        self.left, self.right = nn.Linear(dim, expand * dim, bias), nn.Linear(dim, expand * dim, bias)
        self.conv, self.out = ShortConv(expand * dim, width, conv_bias), nn.Linear(expand * dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, None)[0]

    def step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = self.conv(self.left(x), state)
        return self.out(F.silu(y) * self.right(x)), state


def based_mixers(layers: int, dim: int, heads: int, feature_dim: int = 16, window: int = 64) -> list[nn.Module]:
    """One mixer a layer for `Decoder(mechanism=...)`: of every five, one Taylor linear, one window (rotary), three gated convolutions."""
    made: list[nn.Module] = []
    for layer in range(layers):
        if layer % 5 == 1:
            made.append(Attention(dim, heads, get("based", feature_dim=feature_dim)))
        elif layer % 5 == 3:
            made.append(Attention(dim, heads, based_window(window), rope=True))
        else:
            made.append(GatedConv(dim))
    return made
