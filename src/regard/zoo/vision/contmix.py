"""OverLoCK's context mixing: every pixel's window weights come from its affinity to an overview of the image (id 133; Lou and Yu, 2025).

z = [x, a h + b h_0] (the first block: [x, h]);  z <- z + dwconv_3x3 z;  u = LN z;  f = GRN(conv_1x1(gelu(BN(dwconv_3x3 u)))), C channels
y = conv_1x1(BN(silu(BN(conv_1x1 f)) SE(BN(conv_1x1(windows of f)) + BN(DilatedReparam f))));  windows: `DynamicKernels`, q of u's first C channels,
keys of the others;  z <- z + y;  z <- z + dwconv_3x3 z;  z <- z + MLP(LN z);  x, h = z again.  With on_stream (the released nets) z <- s z + branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.dynamic_kernels import DynamicKernels
from regard.nn.images.grid import ChannelNorm
from regard.nn.images.large_kernels import (
    ChannelScale,
    DilatedReparam,
    RepConvBlock,
    Residual,
    ResidualDepthwise,
    ResponseNorm,
    SqueezeExcite,
    response_mlp,
)
from regard.nn.images.patch_net import depth_rates, small_values
from regard.nn.images.planes import BatchNorm
from regard.nn.parts import takes


def normed(inner: int, outer: int, size: int = 1, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias and its BatchNorm."""
    return [nn.Conv2d(inner, outer, size, stride, size // 2, bias=False), BatchNorm(outer)]


@register("contmix", kind="module")
class ContMix(nn.Module):
    """x (B, dim, H, W), context (B, context_dim, H, W) -> the pair, of the same shapes. first: whether the block takes the context as it is;
    else it also takes `origin`, the context that the first block had, and mixes both by learned scales.

    kernel, small, heads, pool, std: of `DynamicKernels`. ratio: of the MLP, over dim. scale, on_stream, drop_path: of both residuals.
    context_dim=0: x alone, from which keys come too and whose value is conv_1x1 of it; the output is one map.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        kernel: int = 7,
        small: int = 5,
        heads: int = 2,
        ratio: float = 4.0,
        pool: int = 7,
        first: bool = True,
        scale: float | None = None,
        on_stream: bool = False,
        drop_path: float = 0.0,
        std: float | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.dim, self.context_dim, wide = dim, context_dim, dim + context_dim
        alone = context_dim == 0
        self.mixed = None if first or alone else ChannelScale(context_dim)
        self.began = None if first or alone else ChannelScale(context_dim)
        self.near1, self.norm1 = ResidualDepthwise(wide), ChannelNorm(wide, eps)
        local = nn.Conv2d(wide, wide, 3, padding=1, groups=wide), BatchNorm(wide), nn.GELU(), nn.Conv2d(wide, dim, 1), ResponseNorm(dim)
        self.fuse = nn.Identity() if alone else nn.Sequential(*local)
        self.value = nn.Sequential(*normed(dim, dim)) if alone else nn.Identity()
        std = (0.02 if alone else 0.0) if std is None else std
        self.windows = DynamicKernels(dim, context_dim or dim, kernel, small, heads, pool, std)
        self.out = nn.Sequential(*normed(dim, dim))
        self.place = nn.Sequential(DilatedReparam(dim, kernel), BatchNorm(dim))
        self.excite = SqueezeExcite(dim)
        self.gate = nn.Sequential(*normed(dim, dim), nn.SiLU())
        self.last = nn.Sequential(BatchNorm(dim), nn.Conv2d(dim, wide, 1))
        self.near2, self.norm2, self.mlp = ResidualDepthwise(wide), ChannelNorm(wide, eps), response_mlp(wide, int(dim * ratio))
        self.join1, self.join2 = (Residual(wide, scale, on_stream, drop_path) for _ in range(2))

    def mix(self, u: Tensor) -> Tensor:
        """Normed (B, dim + context_dim, H, W) -> the branch's output."""
        f = self.fuse(u)
        key = u[:, self.dim :] if self.context_dim else u
        found = self.out(self.windows(u[:, : self.dim], key, f, self.value))
        return self.last(self.gate(f) * self.excite(found + self.place(f)))  # type: ignore[no-any-return]

    @takes(x="batch dim height width", context="batch context_dim height width", origin="batch context_dim height width")
    def forward(self, x: Tensor, context: Tensor | None = None, origin: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        if (context is None) != (self.context_dim == 0) or (origin is None) != (self.mixed is None):
            needed = "x alone" if self.context_dim == 0 else "x and context" if self.mixed is None else "x, context and origin"
            raise RegardError(f"context is {type(context).__name__}, origin is {type(origin).__name__}; expected {needed}")
        if context is not None and origin is not None and self.mixed is not None and self.began is not None:
            context = self.mixed(context) + self.began(origin)
        z = self.near1(x if context is None else torch.cat((x, context), 1))
        z = self.near2(self.join1(z, self.mix(self.norm1(z))))
        z = self.join2(z, self.mlp(self.norm2(z)))
        return z if context is None else (z[:, : self.dim], z[:, self.dim :])


SIZES: dict[str, dict[str, Any]] = {  # the released nets; the defaults are T's
    "xt": {"dims": (56, 112, 256, 336), "depths": (2, 2, 3, 2), "focus": (6, 2), "heads": (4, 6)},
    "t": {},
    "s": {"dims": (64, 128, 320, 512), "depths": (6, 6, 8, 3), "focus": (16, 3), "heads": (8, 16)},
    "b": {"dims": (80, 160, 384, 576), "depths": (8, 8, 10, 4), "focus": (20, 4), "heads": (6, 9)},
}


class OverLoCK(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes); `both(x)`: these and the auxiliary ones, of the overview.

    A base net of three stages (strides 4, 8, 16), an overview of one more (stride 32), whose map, a quarter of its channels, is the context of the
    focus net: blocks of `ContMix` at strides 16 and 32. depths: of the four stages; focus, heads, focus_ratios: of the focus net's two.
    kernels: of the stages; the focus net has the last two's. scales: first values of residual scales a stage (None: none).
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (4, 4, 6, 2),
        focus: Sequence[int] = (12, 2),
        heads: Sequence[int] = (4, 8),
        kernels: Sequence[int] = (17, 15, 13, 7),
        small: int = 5,
        ratios: Sequence[float] = (4, 4, 4, 4),
        focus_ratios: Sequence[float] = (3, 3),
        scales: Sequence[float | None] = (None, None, 1.0, 1.0),
        on_stream: bool = True,
        channels: int = 3,
        classes: int = 1000,
        projection: int = 1024,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        if (
            not len(dims) == len(depths) == len(kernels) == len(ratios) == len(scales) == 4
            or not len(focus) == len(heads) == len(focus_ratios) == 2
        ):
            raise RegardError("expected 4 of dims, depths, kernels, ratios and scales, and 2 of focus, heads and focus_ratios")
        self.channels, context = channels, dims[3] // 4
        rates = depth_rates(drop_path, (*depths, *focus))
        half, first = dims[0] // 2, dims[0]
        stem = [*normed(channels, half, 3, 2), nn.GELU(), *normed(half, half, 3), nn.GELU(), *normed(half, first, 3, 2), nn.GELU()]
        downs = [[*stem, *normed(first, first, 3)], *[normed(a, b, 3, 2) for a, b in pairwise(dims)]]
        stages = []
        for at in range(4):
            parts = [RepConvBlock(dims[at], kernels[at], ratios[at], scales[at], on_stream, rate, eps) for rate in rates[at][: depths[at]]]
            stages.append(nn.Sequential(*downs[at], *parts))
        self.base, self.overview = nn.Sequential(*stages[:3]), stages[3]
        self.context = nn.Conv2d(dims[3], context, 1)
        self.downs = nn.ModuleList([nn.Sequential(*normed(dims[2], dims[3], 3, 2)), nn.Sequential(*normed(context, context, 3, 2))])
        self.focus = nn.ModuleList()
        for at in range(2):
            blocks = [
                ContMix(
                    dims[2 + at], context, kernels[2 + at], small, heads[at], focus_ratios[at], first=at == number == 0,
                    scale=scales[2 + at], on_stream=on_stream, drop_path=rate, eps=eps,
                )
                for number, rate in enumerate(rates[4 + at])
            ]  # fmt: skip
            self.focus.append(nn.ModuleList(blocks))
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Sequential(*normed(dims[3] + context, projection), nn.SiLU(), *pool, nn.Linear(projection, classes))
        self.aux = nn.Sequential(BatchNorm(dims[3]), *pool, nn.Linear(dims[3], classes))
        self.apply(small_values)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The focus net's last map with its context (B, dims[3] 5/4, H / 32, W / 32), and the overview (B, dims[3], H / 32, W / 32)."""
        x = self.base(x)
        overview = self.overview(x)
        small = self.context(overview)
        origin = context = F.interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)
        blocks: Any = self.focus
        for block in blocks[0]:
            x, context = block(x, context) if block.mixed is None else block(x, context, origin)
        x, context = self.downs[0](x), self.downs[1](context)
        for block in blocks[1]:
            x, context = block(x, context, small)
        return torch.cat((x, context), 1), overview

    @takes(x="batch channels height width")
    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, overview = self.features(x)
        return self.head(found), self.aux(overview)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]


def overlock(size: str, **options: Any) -> OverLoCK:
    """OverLoCK by name: "xt", "t", "s", "b"."""
    if size not in SIZES:
        raise RegardError(f"size={size!r}; expected one of {', '.join(map(repr, SIZES))}")
    return OverLoCK(**{**SIZES[size], **options})
