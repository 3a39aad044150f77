"""Visual attention network: a large kernel's response as the gate (id 159; Guo et al., 2022).

A = conv_1x1(dw_{7x7, dilation 3}(dw_{5x5} x)),  LKA(x) = A x, no softmax and no sigmoid;   unit: x + conv_1x1(LKA(gelu(conv_1x1 x)))
block: x <- x + s_1 unit(BN x), x <- x + s_2 MLP(BN x), MLP: 1x1, depthwise 3x3, GELU, 1x1;  s starts at 0.01
K x K with dilation d: depthwise 2d - 1, then ceil(K / d) dilated
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.grid import ChannelNorm
from regard.nn.images.patch_net import ConvMLP, DropPath, depth_rates, fan_out_values
from regard.nn.images.plane_gates import PlaneGate
from regard.nn.images.planes import BatchNorm, Dilated
from regard.nn.parts import takes


@register("van-lka", kind="module")
class LKA(PlaneGate):
    """x (B, C, H, W) -> x times its response to a kernel of about `kernel` pixels, in C (ceil(kernel/d)^2 + (2d - 1)^2 + C) weights."""

    def __init__(self, channels: int, kernel: int = 21, dilation: int = 3):
        super().__init__()
        near, far = 2 * dilation - 1, -(-kernel // dilation)
        if dilation < 1 or far < 1 or far % 2 == 0:
            raise RegardError(f"kernel={kernel}, dilation={dilation} make a dilated kernel of {far}; expected an odd number")
        self.channels = channels
        self.near = nn.Conv2d(channels, channels, near, padding=near // 2, groups=channels)
        self.far = Dilated(channels, far, dilation)
        self.mix = nn.Conv2d(channels, channels, 1)

    def gate(self, x: Tensor) -> Tensor:
        return self.mix(self.far(self.near(x)))  # type: ignore[no-any-return]


class LKAAttention(nn.Module):
    """x + conv_1x1(LKA(gelu(conv_1x1 x))) on (B, C, H, W)."""

    def __init__(self, channels: int, kernel: int = 21, dilation: int = 3):
        super().__init__()
        self.channels = channels
        self.first, self.act, self.last = nn.Conv2d(channels, channels, 1), nn.GELU(), nn.Conv2d(channels, channels, 1)
        self.attention = LKA(channels, kernel, dilation)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.attention(self.act(self.first(x))))  # type: ignore[no-any-return]


class VANBlock(nn.Module):
    """Both residual branches, each behind a BatchNorm and times a learned factor a channel that starts at `scale`."""

    def __init__(
        self,
        channels: int,
        ratio: float = 4.0,
        kernel: int = 21,
        dilation: int = 3,
        scale: float = 1e-2,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.attention = BatchNorm(channels), LKAAttention(channels, kernel, dilation)
        self.norm2, self.mlp = BatchNorm(channels), ConvMLP(channels, int(channels * ratio), dropout)
        self.drop = DropPath(drop_path)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((channels,), scale)) for _ in range(2))
        self.apply(fan_out_values)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.scale1[:, None, None] * self.attention(self.norm1(x)))
        return x + self.drop(self.scale2[:, None, None] * self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


SIZES = {  # dims, depths
    "b0": ((32, 64, 160, 256), (3, 3, 5, 2)),
    "b1": ((64, 128, 320, 512), (2, 2, 4, 2)),
    "b2": ((64, 128, 320, 512), (3, 3, 12, 3)),
    "b3": ((64, 128, 320, 512), (3, 5, 27, 3)),
    "b4": ((64, 128, 320, 512), (3, 6, 40, 3)),
    "b5": ((96, 192, 480, 768), (3, 3, 24, 3)),
    "b6": ((96, 192, 384, 768), (6, 6, 90, 6)),
}


class VAN(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes); `features(x)`: the maps of the stages, at strides 4, 8, 16 and 32.

    dims, depths, ratios: a number a stage (the defaults are B0's; `van("b2")` names sizes). drop_path: rises linearly over the blocks.
    """

    def __init__(
        self,
        dims: Sequence[int] = SIZES["b0"][0],
        depths: Sequence[int] = SIZES["b0"][1],
        ratios: Sequence[float] = (8, 8, 4, 4),
        channels: int = 3,
        classes: int = 1000,
        kernel: int = 21,
        dilation: int = 3,
        scale: float = 1e-2,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        if not len(dims) == len(depths) == len(ratios):
            raise RegardError(f"dims, depths and ratios name {len(dims)}, {len(depths)} and {len(ratios)} stages; expected as many of each")
        self.channels, inner, self.stages = channels, channels, nn.ModuleList()
        block = partial(VANBlock, kernel=kernel, dilation=dilation, scale=scale, dropout=dropout)
        for at, (dim, rates) in enumerate(zip(dims, depth_rates(drop_path, depths), strict=True)):
            size, stride = (7, 4) if at == 0 else (3, 2)
            parts: list[nn.Module] = [nn.Conv2d(inner, dim, size, stride, size // 2), BatchNorm(dim)]
            parts += [block(dim, ratios[at], drop_path=rate) for rate in rates]
            self.stages.append(nn.Sequential(*parts, ChannelNorm(dim, eps)))
            inner = dim
        self.head = nn.Linear(inner, classes)
        self.apply(fan_out_values)

    @takes(x="batch channels height width")
    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1].mean((2, 3)))  # type: ignore[no-any-return]


def van(size: str, **options: object) -> VAN:
    """VAN-B0 ... VAN-B6 by name, such as van("b2")."""
    if size not in SIZES:
        raise RegardError(f"size={size!r}; expected one of {', '.join(map(repr, SIZES))}")
    dims, depths = SIZES[size]
    return VAN(dims, depths, **options)  # type: ignore[arg-type]
