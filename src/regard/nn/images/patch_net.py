"""Around the token mixers of image nets: the MLP, stochastic depth, first values, and a classifier of patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...errors import RegardError
from ..parts import takes
from .planes import Patches


class FeedForward(nn.Sequential):
    """Linear, GELU, dropout, linear, dropout over the last dimension."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout))


class ConvMLP(nn.Sequential):
    """1 x 1, depthwise 3 x 3, GELU, dropout, 1 x 1, dropout on (B, C, H, W)."""

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0):
        local = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        first, last = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        super().__init__(first, local, nn.GELU(), nn.Dropout(dropout), last, nn.Dropout(dropout))


class DropPath(nn.Module):
    """In training, a sample's whole branch becomes zero with probability `rate`, else it is divided by 1 - rate (Huang et al., 2016)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise RegardError(f"drop_path={rate}; expected at least 0 and less than 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def depth_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of DropPath that rise linearly from 0 to `rate` over the blocks of all stages."""
    total = sum(depths)
    rates = [rate * at / max(total - 1, 1) for at in range(total)]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


def fan_out_values(layer: nn.Module) -> None:
    """For `module.apply`: linear weights N(0, 0.02^2) cut at +-2, convolutions N(0, 2 / (k^2 C_out / groups)), norms 1, all biases 0."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
    elif isinstance(layer, nn.Conv2d):
        fan = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
        nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan))
    elif isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)):
        nn.init.ones_(layer.weight)
    else:
        return
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def small_values(layer: nn.Module) -> None:
    """For `module.apply`: linear and convolutional weights N(0, 0.02^2) cut at +-2, their biases 0."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class PatchNet(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes): patches by a strided convolution, blocks on (B, N, dim), their mean, linear."""

    def __init__(self, block: Callable[[], nn.Module], dim: int, layers: int, channels: int = 3, patch: int = 4, classes: int = 10):
        super().__init__()
        self.channels = channels
        self.patches = Patches(channels, dim, patch)
        self.blocks = nn.Sequential(*[block() for _ in range(layers)])
        self.head = nn.Linear(dim, classes)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]
