"""Mamba-YOLO: selective scans of a map in four orders, inside a one-stage detector (id 196; Wang et al., 2024).

SS2D(x): [a, z] = conv_1x1 x;  a = gelu(dwconv_3x3 a);  y = sum over rows, columns and both backwards of scan(a);  conv_1x1(LN(y) gelu(z))
scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t a_t,  y_t = C_t . h_t + D a_t;  dt = softplus(W_dt W_x a + b), B, C = W_x a, A = -exp(log_a)
LS(x) = x + conv_1x1(gelu(conv_1x1(BN(dwconv_3x3 x))));   RG(x) = conv_1x1(gelu(dwconv_3x3(p) + p) v), [p, v] = conv_1x1 x, 2/3 of the ratio wide
VSS: x = silu(BN(conv_1x1 x));  x <- x + SS2D(LN(LS x));  x <- x + RG(LN x)
First values as the released code's: A = -1, D = 1, W_dt and b standard normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.detection import Detect, Found, PooledPyramid, convolved
from regard.nn.images.grid import ChannelNorm
from regard.nn.images.patch_net import DropPath
from regard.nn.images.planes import BatchNorm
from regard.nn.parts import takes
from regard.nn.selective_scan import SelectiveScan, cross_merge, cross_scan


@register("mamba-yolo", kind="module")
class SS2D(nn.Module):
    """x (B, dim, H, W) -> the same shape. ratio: the width of the scan over dim; rank_ratio: below it, the scan is read through fewer channels,
    without biases. state: numbers a channel; rank: of the step sizes (None: dim / 16 rounded up). kernel: of the convolution (1: none).
    gated: times gelu(z)."""

    def __init__(
        self,
        dim: int,
        state: int = 16,
        ratio: float = 2.0,
        rank_ratio: float = 2.0,
        rank: int | None = None,
        kernel: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        gated: bool = True,
    ):
        super().__init__()
        wide = int(ratio * dim)
        inner = int(min(rank_ratio, ratio) * dim) if rank_ratio > 0 else wide
        if kernel < 1 or kernel % 2 == 0 or inner < 1:
            raise RegardError(f"kernel={kernel}, ratio={ratio}, rank_ratio={rank_ratio}; expected an odd kernel and at least one channel")
        self.dim, self.gated = dim, gated
        self.first, self.last = nn.Conv2d(dim, (1 + gated) * wide, 1, bias=bias), nn.Conv2d(wide, dim, 1, bias=bias)
        self.conv = nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=conv_bias) if kernel > 1 else nn.Identity()
        low = inner < wide
        self.down = nn.Conv2d(wide, inner, 1, bias=False) if low else nn.Identity()
        self.up = nn.Conv2d(inner, wide, 1, bias=False) if low else nn.Identity()
        self.scan, self.norm = SelectiveScan(inner, 4, state, math.ceil(dim / 16) if rank is None else rank), ChannelNorm(inner)
        for values in (self.scan.step, self.scan.bias):
            nn.init.normal_(values)
        nn.init.zeros_(self.scan.log_a)
        self.drop = nn.Dropout(dropout)

    @takes(x="batch dim height width")
    def forward(self, x: Tensor) -> Tensor:
        a, *z = self.first(x).chunk(1 + self.gated, 1)
        y = cross_merge(self.scan(cross_scan(self.down(F.gelu(self.conv(a))))), (x.shape[2], x.shape[3]))
        y = self.up(self.norm(y))
        return self.drop(self.last(y * F.gelu(z[0]) if z else y))  # type: ignore[no-any-return]


class LSBlock(nn.Module):
    """What is near, on (B, dim, H, W): x + conv_1x1(gelu(conv_1x1(BN(dwconv_3x3 x))))."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        mix = nn.Conv2d(dim, dim, 1), nn.GELU(), nn.Conv2d(dim, dim, 1)
        self.branch = nn.Sequential(local, BatchNorm(dim), *mix, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)  # type: ignore[no-any-return]


class RGBlock(nn.Module):
    """The gated MLP on (B, dim, H, W): conv_1x1(gelu(dwconv_3x3(p) + p) v), p and v int(2/3 hidden) channels of a 1 x 1 convolution each."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        inner = int(2 * hidden / 3)
        self.first, self.last = nn.Conv2d(dim, 2 * inner, 1), nn.Conv2d(inner, dim, 1)
        self.local, self.drop = nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        p, v = self.first(x).chunk(2, 1)
        return self.drop(self.last(self.drop(F.gelu(self.local(p) + p) * v)))  # type: ignore[no-any-return]


class VSSBlock(nn.Module):
    """x (B, inner, H, W) -> (B, dim, H, W). scans: how many SS2D follow one another in the branch. neck: as the detector's neck has it (XSSBlock):
    the first convolution has no bias, and is left out where inner is dim. ratio: of the MLP (0: none). options: of SS2D."""

    def __init__(
        self, inner: int, dim: int, scans: int = 1, ratio: float = 4.0, drop_path: float = 0.0, neck: bool = False, **options: Any
    ):
        super().__init__()
        self.channels = inner
        first = nn.Sequential(nn.Conv2d(inner, dim, 1, bias=not neck), BatchNorm(dim), nn.SiLU())
        self.first = nn.Identity() if neck and inner == dim else first
        self.local, self.norm1 = LSBlock(dim), ChannelNorm(dim, 1e-6)
        self.scans = nn.Sequential(*[SS2D(dim, **options) for _ in range(scans)])
        self.norm2 = ChannelNorm(dim, 1e-6) if ratio > 0 else None
        self.mlp = RGBlock(dim, int(dim * ratio)) if ratio > 0 else None
        self.drop = DropPath(drop_path)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.drop(self.scans(self.norm1(self.local(x))))
        return x if self.mlp is None or self.norm2 is None else x + self.drop(self.mlp(self.norm2(x)))


class VisionClueMerge(nn.Module):
    """(B, inner, H, W) -> (B, dim, H / 2, W / 2): the four pixels of each 2 x 2 side by side, 1 x 1 convolution, BatchNorm, SiLU."""

    def __init__(self, inner: int, dim: int):
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(4 * inner, dim, 1), BatchNorm(dim), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise RegardError(f"x has a map of {tuple(x.shape[2:])}; expected even sides, which halve")
        return self.mix(torch.cat([x[..., i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], 1))  # type: ignore[no-any-return]


def simple_stem(channels: int, dim: int) -> nn.Sequential:
    """Two 3 x 3 convolutions of stride 2 without biases, BatchNorm behind each, GELU behind the first and SiLU behind the second."""
    half = dim // 2
    first = nn.Conv2d(channels, half, 3, 2, 1, bias=False), BatchNorm(half), nn.GELU()
    return nn.Sequential(*first, nn.Conv2d(half, dim, 3, 2, 1, bias=False), BatchNorm(dim), nn.SiLU())


SIZES = {"T": (0.33, 0.25, 1024), "B": (0.33, 0.5, 1024), "L": (0.67, 0.75, 768)}  # depth, width, most channels before width


class MambaYOLO(nn.Module):
    """Images (B, channels, H, W), sides multiples of 32 -> `Found` at strides 8, 16 and 32; boxes, losses and picks are nn/images/detection.py's.

    dims, depths: of the stages at strides 4, 8, 16 and 32; neck: scans in each block of the neck. eps, momentum: of every BatchNorm.
    """

    def __init__(
        self,
        classes: int = 80,
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (1, 1, 3, 1),
        neck: int = 1,
        channels: int = 3,
        eps: float = 1e-3,
        momentum: float = 0.03,
        **options: Any,
    ):
        super().__init__()
        if len(dims) != 4 or len(depths) != 4:
            raise RegardError(f"dims and depths name {len(dims)} and {len(depths)} stages; expected 4 of each")
        self.channels = channels
        _, low, middle, high = dims
        first = [simple_stem(channels, dims[0])] + [VisionClueMerge(a, b) for a, b in pairwise(dims)]
        self.stages = nn.ModuleList()
        for down, dim, depth in zip(first, dims, depths, strict=True):
            self.stages.append(nn.Sequential(down, *[VSSBlock(dim, dim, **options) for _ in range(depth)]))
        self.pool = PooledPyramid(high, high)
        shapes = ((high + middle, middle), (middle + low, low), (low + middle, middle), (middle + high, high))
        self.neck = nn.ModuleList([VSSBlock(a, b, neck, neck=True, **options) for a, b in shapes])
        self.downs = nn.ModuleList([convolved(low, low, 3, 2), convolved(middle, middle, 3, 2)])
        self.head = Detect(dims[1:], (8, 16, 32), classes)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps, part.momentum = eps, momentum

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Found:
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise RegardError(f"x has {tuple(x.shape[2:])} pixels; expected multiples of 32")
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        low, middle, high = maps[1], maps[2], self.pool(x)
        middle = self.neck[0](torch.cat((F.interpolate(high, scale_factor=2.0), middle), 1))
        low = self.neck[1](torch.cat((F.interpolate(middle, scale_factor=2.0), low), 1))
        middle = self.neck[2](torch.cat((self.downs[0](low), middle), 1))
        return self.head((low, middle, self.neck[3](torch.cat((self.downs[1](middle), high), 1))))  # type: ignore[no-any-return]


class MambaYOLOMini(nn.Module):
    """Images (B, channels, H, W) -> `Found` at stride 4 alone: the stem, `depth` blocks, the head. side: of the images it is made for."""

    def __init__(self, classes: int, dim: int = 16, depth: int = 1, channels: int = 3, side: int = 32, **options: Any):
        super().__init__()
        self.channels = channels
        self.body = nn.Sequential(simple_stem(channels, dim), *[VSSBlock(dim, dim, **options) for _ in range(depth)])
        self.head = Detect((dim,), (4,), classes, side=side)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Found:
        return self.head((self.body(x),))  # type: ignore[no-any-return]


def mamba_yolo(size: str, **options: Any) -> MambaYOLO:
    """Mamba-YOLO-T, -B or -L by name, as mamba_yolo("T")."""
    if size not in SIZES:
        raise RegardError(f"size={size!r}; expected one of {', '.join(map(repr, SIZES))}")
    depth, width, most = SIZES[size]
    dims = [8 * math.ceil(min(dim, most) * width / 8) for dim in (128, 256, 512, 1024)]
    depths = [max(round(n * depth), 1) for n in (3, 3, 9, 3)]
    return MambaYOLO(dims=dims, depths=depths, neck=depths[0], **options)
