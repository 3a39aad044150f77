"""Based: linear attention with the second-order Taylor map of exp, in a small feature dimension (id 163; Arora et al., 2024).

    phi(q).phi(k) = 1 + s + s^2/2,  s = q.k / sqrt(D'),  D' = 16;   o_t = phi(q_t) S_t / (phi(q_t).z_t)
The model around it mixes these layers with sliding-window softmax and gated short convolutions: `regard.nn.based_mixers`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, FeatureMap, Recipe, Recurrent, Weighted, Window, taylor
from regard.algebra.feature_map import taylor_kernel, taylor_packed
from regard.catalog import get
from regard.catalog.registry import register
from regard.nn.attention import Attention
from regard.nn.parts import ShortConv


@register("based")
def based(feature_dim: int = 16, packed: bool = False, eps: float = 1e-12, divide: str = "sum") -> Recurrent:
    """feature_dim: channels of q and k a head in the layer; the state is 1 + D' + D'^2 wide ((D'+1)(D'+2)/2 if packed). divide: "sum" by the
    sum, at least eps, as the layer; "add" by the sum plus eps, as the functional form; "none"."""
    return Recurrent(
        FeatureMap(taylor_packed if packed else taylor, kernel=taylor_kernel),
        readout=divide,
        eps=eps,
        scaled=False,
        recipe=Recipe(rope=False, key_dim=feature_dim),
    )


def based_window(window: int = 64) -> Weighted:
    """The exact sliding-window partner."""
    return Weighted(mask=Causal() & Window(window))


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
