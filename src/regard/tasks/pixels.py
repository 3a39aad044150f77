"""Handwritten digits read pixel by pixel, as they are, under noise and at another brightness."""

from __future__ import annotations

import torch
from torch import Tensor

from .digits import written


def pixel_sequences(
    held_out: bool = False, noise: float = 0.0, scale: float = 1.0, drop: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as sequences: x (n, 64, 1), a pixel after another from 0 to 1, and labels (n,).

    scale: x is multiplied by it. noise: the deviation of normal noise added then. drop: the share of pixels that are 0 instead.
    """
    ink, labels = written(held_out)
    generator = torch.Generator().manual_seed(seed)
    x = scale * ink.flatten(1)
    x = x + noise * torch.randn(x.shape, generator=generator)
    gone = torch.rand(x.shape, generator=generator) < drop
    return x.masked_fill(gone, 0.0)[..., None], labels
