"""Tables of two classes drawn from simple laws, for models that learn in context."""

from __future__ import annotations

import torch
from torch import Tensor


def tables(
    count: int, rows: int, features: int, generator: torch.Generator, steps: float = 0.5, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x (count, rows, features), normal, and classes y (count, rows): for a share `steps` of the tables, whether one drawn feature is above a
    drawn threshold; for the others, whether a drawn linear form of all is positive. noise: the share of rows whose class is drawn anew."""
    x = torch.randn(count, rows, features, generator=generator)
    chosen = torch.randint(0, features, (count, 1, 1), generator=generator).expand(-1, rows, 1)
    threshold = 0.7 * torch.randn(count, 1, generator=generator)
    step = x.gather(2, chosen)[..., 0] > threshold
    linear = (x * torch.randn(count, 1, features, generator=generator)).sum(-1) > 0
    y = torch.where(torch.rand(count, 1, generator=generator) < steps, step, linear).long()
    lots = torch.randint(0, 2, (count, rows), generator=generator)
    return x, torch.where(torch.rand(count, rows, generator=generator) < noise, lots, y)
