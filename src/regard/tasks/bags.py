"""Bags of instances, some of which are of a kind that decides the bag's label."""

from __future__ import annotations

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def mixed_bags(
    count: int,
    generator: torch.Generator,
    instances: int = 200,
    features: int = 16,
    kinds: int = 3,
    positive: int = 30,
    strengths: tuple[float, ...] = (3.0, 2.0, 1.5),
) -> Batch:
    """Bags (count, instances, features) of standard normal instances, labels 0 or 1: in bags of label 1, `positive` instances, of `kinds` kinds in
    turn, are moved along their kind's axis, by its own strength."""
    x = torch.randn(count, instances, features, generator=generator)
    label = torch.randint(2, (count,), generator=generator)
    for at in range(positive):
        kind = at % kinds
        x[:, at, kind] += strengths[kind] * label
    order = torch.rand(count, instances, generator=generator).argsort(1)
    return x.gather(1, order[..., None].expand_as(x)), label
