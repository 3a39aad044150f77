"""Non-overlapping windows of a map, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def to_windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, size^2, C), H and W multiples of size."""
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`."""
    return x.unflatten(1, (size, size)).unflatten(0, (-1, height // size, width // size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def filled_up(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) with rows and columns of zeros behind, up to multiples of size."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size, 0, -x.shape[1] % size))
