"""A small convolutional net with a slot in each block, to try a module on maps in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .planes import BatchNorm

Slot = Callable[[int], nn.Module]


class SlotBlock(nn.Module):
    """relu(x' + slot(BN(conv3x3(relu(BN(conv3x3 x)))))), x' a strided 1 x 1 convolution of x where the shape changes."""

    def __init__(self, inner: int, width: int, stride: int, slot: Slot | None):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inner, width, 3, stride, 1, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm(width),
        )
        self.slot = nn.Identity() if slot is None else slot(width)
        same = inner == width and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, width, 1, stride, bias=False), BatchNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.skip(x) + self.slot(self.branch(x)))


class SlotNet(nn.Module):
    """Images (B, channels, H, W) -> (B, outputs), or with dense=True maps (B, outputs, H, W).

    slot: width -> the module after the last norm of each block's branch (None: nothing). widths: a block each; every block after the first
    halves the plane, unless dense.
    """

    def __init__(self, channels: int, outputs: int, slot: Slot | None = None, widths: tuple[int, ...] = (16, 32), dense: bool = False):
        super().__init__()
        self.dense = dense
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), BatchNorm(widths[0]), nn.ReLU())
        inner = (widths[0], *widths[:-1])
        strides = [1 if dense or at == 0 else 2 for at in range(len(widths))]
        self.blocks = nn.Sequential(*[SlotBlock(i, o, s, slot) for i, o, s in zip(inner, widths, strides, strict=True)])
        self.head = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x) if self.dense else self.head(x.mean((2, 3), keepdim=True))[..., 0, 0]  # type: ignore[no-any-return]
