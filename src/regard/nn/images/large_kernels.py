"""Around large kernels on maps (B, C, H, W): depthwise kernels with dilated branches that fold into one, and what networks of them share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RegardError
from .grid import ChannelNorm
from .patch_net import DropPath
from .planes import BatchNorm

BRANCHES = {  # kernel: (size, dilation) of each branch beside it (UniRepLKNet's)
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DilatedReparam(nn.Module):
    """x (B, channels, H, W) -> BN(dwconv_k x) + sum of BN(dilated dwconv x) over the branches of the kernel (Ding et al., 2024).

    kernel: an odd number from 5 to 19. After `merge()` one depthwise convolution with a bias stands for all, as they are in evaluation.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        if kernel not in BRANCHES:
            raise RegardError(f"kernel={kernel}; expected one of {', '.join(map(str, BRANCHES))}")
        shapes = ((kernel, 1), *BRANCHES[kernel])
        self.kernel = kernel
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, k, padding=d * (k // 2), dilation=d, groups=channels, bias=False) for k, d in shapes
        )
        self.norms = nn.ModuleList(BatchNorm(channels) for _ in shapes)
        self.merged: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(x)  # type: ignore[no-any-return]
        out = self.norms[0](self.convs[0](x))
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            out = out + norm(conv(x))
        return out  # type: ignore[no-any-return]

    @torch.no_grad()
    def merge(self) -> None:
        """Fold norms and branches, with their running statistics, into one convolution; training them is over."""
        if self.merged is not None:
            return
        k = self.kernel
        convs: Any = self.convs
        norms: Any = self.norms
        weight, bias = torch.zeros_like(convs[0].weight), torch.zeros_like(norms[0].bias)
        for conv, norm in zip(convs, norms, strict=True):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            step = conv.dilation[0]
            start = k // 2 - step * (conv.weight.shape[-1] // 2)
            at = slice(start, k - start, step)
            weight[:, :, at, at] += conv.weight * scale[:, None, None, None]
            bias += norm.bias - norm.running_mean * scale
        channels = len(bias)
        self.merged = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels).to(weight)
        self.merged.weight.copy_(weight)
        self.merged.bias.copy_(bias)  # type: ignore[union-attr]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()


def merged(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, every `DilatedReparam` of it merged, in place."""
    for part in model.eval().modules():
        if isinstance(part, DilatedReparam):
            part.merge()
    return model


class ResponseNorm(nn.Module):
    """x (1 + gamma n_c) + beta, n_c = |x_c| / (mean over channels of |x_c| + eps), |x_c| the norm over the plane (GRN, Woo et al., 2023)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma, self.beta = (nn.Parameter(torch.zeros(channels, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        return (1 + self.gamma * size / (size.mean(1, keepdim=True) + self.eps)) * x + self.beta


class ChannelScale(nn.Module):
    """A learned factor a channel, which starts at `init`, and a bias, which starts at 0."""

    def __init__(self, channels: int, init: float = 1.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((channels, 1, 1), init)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


class SqueezeExcite(nn.Module):
    """x sigmoid(conv_1x1(gelu(conv_1x1(mean over the plane)))), max(least, C // reduction) channels between."""

    def __init__(self, channels: int, reduction: int = 8, least: int = 16):
        super().__init__()
        hidden = max(least, channels // reduction)
        self.first, self.last = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.last(F.gelu(self.first(x.mean((2, 3), keepdim=True)))))


class ResidualDepthwise(nn.Conv2d):
    """x + dwconv_3x3 x."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def response_mlp(channels: int, hidden: int) -> nn.Sequential:
    """1 x 1, GELU, x + dwconv_3x3 x, GRN, 1 x 1."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1), nn.GELU(), ResidualDepthwise(hidden), ResponseNorm(hidden), nn.Conv2d(hidden, channels, 1)
    )


class Residual(nn.Module):
    """Where a branch joins its stream: x + drop(s(branch)), or s(x) + drop(branch) if `on_stream`; s is a ChannelScale from `init` (None: none)."""

    def __init__(self, channels: int, init: float | None = None, on_stream: bool = False, drop_path: float = 0.0):
        super().__init__()
        self.scale = nn.Identity() if init is None else ChannelScale(channels, init)
        self.drop, self.on_stream = DropPath(drop_path), on_stream

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.on_stream:
            return self.scale(x) + self.drop(branch)  # type: ignore[no-any-return]
        return x + self.drop(self.scale(branch))  # type: ignore[no-any-return]


class RepConvBlock(nn.Module):
    """x <- x + dwconv_3x3 x; then, joined as `Residual`, conv MLP(SE(BN(DilatedReparam_k(LN x)))), on (B, channels, H, W)."""

    def __init__(
        self,
        channels: int,
        kernel: int = 7,
        ratio: float = 4.0,
        scale: float | None = None,
        on_stream: bool = False,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.near = ResidualDepthwise(channels)
        self.branch = nn.Sequential(
            ChannelNorm(channels, eps),
            DilatedReparam(channels, kernel),
            BatchNorm(channels),
            SqueezeExcite(channels),
            *response_mlp(channels, int(channels * ratio)),
        )
        self.join = Residual(channels, scale, on_stream, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.near(x)
        return self.join(x, self.branch(x))  # type: ignore[no-any-return]
