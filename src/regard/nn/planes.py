"""Tokens of heads as planes of a grid, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError


def grid_of(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, heads, H*W, D) -> (B * heads, D, H, W)."""
    return x.flatten(0, 1).transpose(1, 2).unflatten(-1, shape)


def sequence_of(x: Tensor, batch: int) -> Tensor:
    """The inverse of `grid_of`."""
    return x.flatten(2).transpose(1, 2).unflatten(0, (batch, -1))


class StridedTokens(nn.Module):
    """Tokens of a grid, x (B, H*W, dim) -> (B, H*W / ratio^2, dim): a convolution of stride `ratio`, then LayerNorm (PVT's reduction)."""

    def __init__(self, dim: int, shape: tuple[int, int], ratio: int):
        super().__init__()
        if shape[0] % ratio or shape[1] % ratio:
            raise RegardError(f"sr_ratio={ratio}: expected a divisor of both sides of the grid {shape}")
        self.shape, self.conv, self.norm = shape, nn.Conv2d(dim, dim, ratio, ratio), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.transpose(1, 2).unflatten(-1, self.shape)).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


def query_and_rest(qkv: nn.Linear, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q of x, and k and v of `source`, by one projection with three parts."""
    dim, bias = x.shape[-1], qkv.bias
    q = F.linear(x, qkv.weight[:dim], None if bias is None else bias[:dim])
    k, v = F.linear(source, qkv.weight[dim:], None if bias is None else bias[dim:]).chunk(2, -1)
    return q, k, v


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that says what is wrong where a batch has no variance to train on."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            raise RegardError(
                f"x is one value a channel, {tuple(x.shape)}, in training; expected more images or pixels for BatchNorm, or eval()"
            )
        return super().forward(x)


class Patches(nn.Conv2d):
    """A convolution whose stride is its size, (B, C, H, W) -> (B, out, H // size, W // size); rows and columns that fill no patch are left out."""

    def __init__(self, channels: int, out: int, size: int):
        super().__init__(channels, out, size, size)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.stride[0]:
            raise RegardError(f"x has a map of {tuple(x.shape[2:])}; expected at least one patch of {self.stride[0]} x {self.stride[0]}")
        return super().forward(x)
