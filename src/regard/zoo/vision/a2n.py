"""Attention in attention: a block weighs, image by image, whether its attention helps (id 111; Chen et al., 2021).

x' = lrelu(conv_1x1 x),  pi = softmax(W_2 relu(W_1 mean_hw x') / t)
y = x + conv_1x1(lrelu(pi_0 A(x') + pi_1 N(x'))),  A(x) = conv_3x3(conv_3x3(x) sigmoid(conv_1x1(lrelu(conv_3x3 x)))),  N a convolution
net: 3x3, 16 such blocks, 3x3 and a long skip; nearest upsampling with 3x3, pixel attention, 3x3; 3x3; plus the bilinear image
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.plane_gates import PlaneGate, narrowed
from regard.nn.parts import takes


class PixelAttention(PlaneGate):
    """x (B, C, H, W) -> x sigmoid(conv_1x1 x), a factor a value."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, channels, 1)

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x))


class AttentionBranch(nn.Module):
    """conv(conv(x) sigmoid(conv_1x1(lrelu(conv(x))))), convolutions of `kernel` without bias."""

    def __init__(self, channels: int, kernel: int = 3, slope: float = 0.2):
        super().__init__()
        self.slope = slope
        self.first, self.value, self.last = (nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False) for _ in range(3))
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.mix(F.leaky_relu(self.first(x), self.slope)))
        return self.last(self.value(x) * gate)  # type: ignore[no-any-return]


class AttentionInAttention(nn.Module):
    """x (B, C, H, W) -> the same shape. `weights(x)`: (B, 2), of the branch with attention and of the one without.

    temperature: of their softmax. plain_kernel: of the branch without (3; 1 in A2N-M). slope: of leaky ReLUs.
    """

    def __init__(
        self, channels: int = 40, reduction: int = 4, temperature: float = 30.0, plain_kernel: int = 3, kernel: int = 3, slope: float = 0.2
    ):
        super().__init__()
        if plain_kernel % 2 == 0 or kernel % 2 == 0 or temperature <= 0:
            raise RegardError(
                f"plain_kernel={plain_kernel}, kernel={kernel}, temperature={temperature}; expected odd kernels and a positive number"
            )
        hidden = narrowed(channels, reduction)
        self.channels, self.temperature, self.slope = channels, temperature, slope
        self.first, self.last = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
        self.router = nn.Sequential(nn.Linear(channels, hidden, False), nn.ReLU(), nn.Linear(hidden, 2, False))
        self.attention = AttentionBranch(channels, kernel, slope)
        self.plain = nn.Conv2d(channels, channels, plain_kernel, padding=plain_kernel // 2, bias=False)

    def opened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.leaky_relu(self.first(x), self.slope)
        return h, torch.softmax(self.router(h.mean((2, 3))) / self.temperature, -1)

    def weights(self, x: Tensor) -> Tensor:
        return self.opened(x)[1]

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        h, share = self.opened(x)
        one, other = share[:, :, None, None, None].unbind(1)
        return x + self.last(F.leaky_relu(one * self.attention(h) + other * self.plain(h), self.slope))  # type: ignore[no-any-return]


@register("a2n", kind="module")
class A2N(nn.Module):
    """Small images (B, colours, h, w) -> (B, colours, scale h, scale w). plain_kernel=1: A2N-M. scale: 2, 3 or 4.

    `branch_weights(x)`: (blocks, B, 2), what each block gives to its branches with and without attention. colours: channels of images.
    """

    def __init__(
        self,
        scale: int = 4,
        width: int = 40,
        up_width: int = 24,
        blocks: int = 16,
        plain_kernel: int = 3,
        colours: int = 3,
        reduction: int = 4,
        temperature: float = 30.0,
        slope: float = 0.2,
    ):
        super().__init__()
        if scale not in (2, 3, 4):
            raise RegardError(f"scale={scale}; expected 2, 3 or 4")
        self.scale, self.colours, self.slope = scale, colours, slope
        self.first, self.close = nn.Conv2d(colours, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList([AttentionInAttention(width, reduction, temperature, plain_kernel, slope=slope) for _ in range(blocks)])
        self.steps, self.ups, inner = ((2, 2) if scale == 4 else (scale,)), nn.ModuleList(), width
        for _ in self.steps:
            convs = nn.Conv2d(inner, up_width, 3, padding=1), PixelAttention(up_width), nn.Conv2d(up_width, up_width, 3, padding=1)
            self.ups.append(nn.ModuleList(convs))
            inner = up_width
        self.last = nn.Conv2d(up_width, colours, 3, padding=1)

    @takes(x="batch colours height width")
    def forward(self, x: Tensor) -> Tensor:
        first = h = self.first(x)
        for block in self.blocks:
            h = block(h)
        h = first + self.close(h)
        for times, up in zip(self.steps, self.ups, strict=True):
            conv, attention, again = up.children()
            h = conv(F.interpolate(h, scale_factor=float(times), mode="nearest"))
            h = F.leaky_relu(again(F.leaky_relu(attention(h), self.slope)), self.slope)
        return self.last(h) + F.interpolate(x, scale_factor=float(self.scale), mode="bilinear", align_corners=False)  # type: ignore[no-any-return]

    @torch.no_grad()
    @takes(x="batch colours height width")
    def branch_weights(self, x: Tensor) -> Tensor:
        h, found = self.first(x), []
        for block in self.blocks:
            found.append(block.weights(h))  # type: ignore[operator]
            h = block(h)
        return torch.stack(found)
