"""Polarized self-attention: collapse the plane or the channels, never both at once (id 294; Liu et al., 2021).

channels: A_c = sigmoid(LN(W_z (W_v x . softmax_hw(W_q x))));  pixels: A_p = sigmoid(softmax_c(mean_hw(W_q' x)) . W_v' x), at C/2 inside
parallel: y = x A_c + x A_p;  sequential: x' = x A_c, y = x' A_p(x')
The released code differs (released=True): parallel has no LN, and softmaxes the product over the plane; sequential makes A_c through
C/8 channels (1x1, LN, ReLU, 1x1, with biases), and softmaxes W_v' x over the plane, not the pooled query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.plane_gates import PlaneGate, multiplied_again, narrowed, over_plane
from regard.nn.parts import takes


@register("polarized-attention", kind="module")
class PolarizedSelfAttention(PlaneGate):
    """x (B, C, H, W) -> the same shape. layout: "parallel" or "sequential". `over_channels(x)`: (B, C, 1, 1); `over_pixels(x)`: (B, 1, H, W).

    released: the released code's forms in place of the paper's. inner: what its sequential form divides C/2 by. No map of HW x HW or C x C.
    """

    def __init__(self, channels: int, layout: str = "parallel", released: bool = False, inner: int = 4):
        super().__init__()
        if layout not in ("parallel", "sequential"):
            raise RegardError(f"layout={layout!r}; expected 'parallel' or 'sequential'")
        half = narrowed(channels, 2)
        self.channels, self.layout, self.released = channels, layout, released
        self.q_plane, self.v_plane = nn.Conv2d(channels, 1, 1, bias=False), nn.Conv2d(channels, half, 1, bias=False)
        self.q_channel, self.v_channel = nn.Conv2d(channels, half, 1, bias=False), nn.Conv2d(channels, half, 1, bias=False)
        for conv in (self.q_plane, self.v_plane, self.q_channel, self.v_channel):
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
        self.up: nn.Module = nn.Linear(half, channels, bias=False)
        self.norm: nn.Module = nn.Identity() if released else nn.LayerNorm(channels)
        if released and layout == "sequential":
            low = narrowed(half, inner)
            self.up = nn.Sequential(nn.Linear(half, low), nn.LayerNorm(low), nn.ReLU(), nn.Linear(low, channels))

    def over_channels(self, x: Tensor) -> Tensor:
        weights = over_plane(self.q_plane.weight[0, :, 0, 0], x).flatten(1).softmax(-1)
        read = F.linear((x.flatten(2) @ weights[..., None])[..., 0], self.v_plane.weight[..., 0, 0])  # W_v (x . w) for (W_v x) . w
        return torch.sigmoid(self.norm(self.up(read)))[..., None, None]

    def over_pixels(self, x: Tensor) -> Tensor:
        query = F.linear(x.mean((2, 3)), self.q_channel.weight[..., 0, 0])  # of the mean, for the mean of W_q' x
        if self.released and self.layout == "sequential":
            scores = (query[:, None] @ F.softmax(self.v_channel(x).flatten(2), -1))[:, 0]
        else:
            query = query if self.released else F.softmax(query, -1)
            scores = over_plane(query @ self.v_channel.weight[..., 0, 0], x).flatten(1)  # (q W_v') x for q (W_v' x)
        if self.released and self.layout == "parallel":
            scores = F.softmax(scores, -1)
        return torch.sigmoid(scores).view(x.shape[0], 1, *x.shape[2:])

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "parallel":
            return x * self.gate(x)
        gated = x * self.over_channels(x)
        return multiplied_again(gated, self.over_pixels(gated))

    def gate(self, x: Tensor) -> Tensor:
        first = self.over_channels(x)
        return first + self.over_pixels(x) if self.layout == "parallel" else first * self.over_pixels(x * first)
