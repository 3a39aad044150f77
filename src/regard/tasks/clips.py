"""Clips in which a class tells which channel marks when its action happens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Clips(NamedTuple):
    """features (B, channels, T), semantics (B, channels, T), first and last (B,): the action's bounds."""

    features: Tensor
    semantics: Tensor
    first: Tensor
    last: Tensor


def told_channels(
    count: int, generator: torch.Generator, channels: int = 8, length: int = 64, noise: float = 0.1, sizes: tuple[int, int] = (8, 24)
) -> Clips:
    """In every channel a raised span, its size from sizes[0] to sizes[1] - 1; the action's is the one in the channel that the semantics name, at all times, under noise."""
    size = torch.randint(*sizes, (count, channels), generator=generator)
    first = (torch.rand(count, channels, generator=generator) * (length - size)).long()
    at = torch.arange(length)
    spans = (at >= first[..., None]) & (at < (first + size)[..., None])
    name = torch.randint(channels, (count,), generator=generator)
    features = spans + noise * torch.randn(count, channels, length, generator=generator)
    semantics = F.one_hot(name, channels)[..., None] + noise * torch.randn(count, channels, length, generator=generator)
    own = first.gather(1, name[:, None])[:, 0]
    return Clips(features, semantics, own, own + size.gather(1, name[:, None])[:, 0] - 1)
