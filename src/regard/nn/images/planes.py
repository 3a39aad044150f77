"""Tokens of heads as planes of a grid, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RegardError


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
    """BatchNorm2d that says what is wrong where a batch has no variance to train on, and whose gradients are right for a single image in evaluation too:
    there PyTorch's own (2.13) takes a gradient with its channels last but one in memory for another order."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            raise RegardError(
                f"x is one value a channel, {tuple(x.shape)}, in training; expected more images or pixels for BatchNorm, or eval()"
            )
        mean, var = self.running_mean, self.running_var
        if self.training or mean is None or var is None or len(x) != 1 or x.dim() != 4 or not torch.is_grad_enabled():
            return super().forward(x)
        scale = (var + self.eps).rsqrt() if self.weight is None else self.weight * (var + self.eps).rsqrt()
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def max_around(x: Tensor, size: int) -> Tensor:
    """The largest of size x size pixels around each of x (B, C, H, W), size odd: max pooling of stride 1, row by row and then column by column where no
    gradient is kept, which on a processor is several times as fast as PyTorch's. The first of equals takes the gradient."""
    if not torch.is_grad_enabled():
        for dim in (3, 2):
            wide, x = x, x.clone()
            for off in range(1, min(size // 2, x.shape[dim] - 1) + 1):
                for to, of in ((off, 0), (0, off)):
                    length = x.shape[dim] - off
                    part = x.narrow(dim, to, length)
                    torch.maximum(part, wide.narrow(dim, of, length), out=part)
        return x
    return F.max_pool2d(x, size, 1, size // 2)


class Dilated(nn.Conv2d):
    """A depthwise convolution (B, C, H, W) -> (B, C, H, W) of an odd kernel, `dilation` pixels between its values. On a processor every dilation-th row and
    column is an image of its own, convolved without dilation, which is several times as fast."""

    def __init__(self, channels: int, kernel: int, dilation: int):
        super().__init__(channels, channels, kernel, padding=kernel // 2 * dilation, groups=channels, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        d, k, size = self.dilation[0], self.kernel_size[0] // 2, x.shape[2:]
        if d == 1 or x.device.type != "cpu" or not x.numel():
            return super().forward(x)
        wide = F.pad(x, (0, -size[1] % d, 0, -size[0] % d)).unflatten(3, (-1, d)).unflatten(2, (-1, d))
        phases = wide.permute(0, 3, 5, 1, 2, 4)  # (B, d, d, C, rows, columns)
        found = F.conv2d(phases.flatten(0, 2), self.weight, self.bias, padding=k, groups=self.groups).unflatten(0, phases.shape[:3])
        return found.permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)[:, :, : size[0], : size[1]]


class Patches(nn.Conv2d):
    """A convolution whose stride is its size, (B, C, H, W) -> (B, out, H // size, W // size); rows and columns that fill no patch are left out."""

    def __init__(self, channels: int, out: int, size: int):
        super().__init__(channels, out, size, size)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.stride[0]:
            raise RegardError(f"x has a map of {tuple(x.shape[2:])}; expected at least one patch of {self.stride[0]} x {self.stride[0]}")
        return super().forward(x)
