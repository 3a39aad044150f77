"""Efficient local attention: a gate a row and a gate a column from strips of means (id 216; Xu and Wan, 2024).

g_h = sigmoid(GN(conv1d_k(mean_w x))),  g_w = sigmoid(GN(conv1d_k(mean_h x))),  y = x g_h g_w;  one convolution and one norm for both
T: k 5, a group a channel, GN 32;  B: 7, a channel, 16;  S: 5, 8 channels a group, 16;  L: 7, 8 channels, 16
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.plane_gates import StripGate
from regard.nn.images.planes import BatchNorm

VARIANTS = {"T": (5, 1, 32), "B": (7, 1, 16), "S": (5, 8, 16), "L": (7, 8, 16)}  # kernel, channels a group, groups of the norm


@register("ela", kind="module")
class ELA(StripGate):
    """x (B, C, H, W) -> the same shape, any H and W; `strips(x)` gives the row gate (B, C, H, 1) and the column gate (B, C, 1, W).

    kernel, group (channels a group of the convolution), norm_groups: None for the variant's. C must be a multiple of both.
    """

    def __init__(
        self,
        channels: int,
        variant: str = "B",
        kernel: int | None = None,
        group: int | None = None,
        norm_groups: int | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise RegardError(f"variant={variant!r}; expected one of {', '.join(map(repr, VARIANTS))}")
        k, g, n = (given or usual for given, usual in zip((kernel, group, norm_groups), VARIANTS[variant], strict=True))
        if channels % g or channels % n or k % 2 == 0:
            raise RegardError(
                f"channels={channels}, kernel={k}; expected a multiple of group={g} and of norm_groups={n}, and an odd kernel"
            )
        self.channels = channels
        self.conv = nn.Conv1d(channels, channels, k, padding=k // 2, groups=channels // g, bias=False)
        self.norm = nn.GroupNorm(n, channels, eps)

    def strips(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.norm  # its function, for the module refuses a strip of one value in a batch of one, whose groups have more
        rows, columns = (
            torch.sigmoid(torch.group_norm(self.conv(x.mean(dim)), norm.num_groups, norm.weight, norm.bias, norm.eps)) for dim in (3, 2)
        )
        return rows[..., None], columns[:, :, None]


class CoordinateAttention(StripGate):
    """What ELA changes: strips of means side by side, conv 1x1 to max(8, C // reduction) channels, BatchNorm, h-swish, then a 1x1
    convolution and a sigmoid a direction (Hou et al., 2021)."""

    def __init__(self, channels: int, reduction: int = 32, least: int = 8):
        super().__init__()
        hidden = max(least, channels // reduction)
        self.channels = channels
        self.squeeze = nn.Sequential(nn.Conv2d(channels, hidden, 1), BatchNorm(hidden), nn.Hardswish())
        self.rows, self.columns = nn.Conv2d(hidden, channels, 1), nn.Conv2d(hidden, channels, 1)

    def strips(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT), 2)
        rows, columns = self.squeeze(both).split((x.shape[2], x.shape[3]), 2)
        return torch.sigmoid(self.rows(rows)), torch.sigmoid(self.columns(columns.mT))
