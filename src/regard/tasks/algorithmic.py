"""Algorithmic reasoning: exact answers of dynamic programmes, with splits that are longer, larger or perturbed (as tropical attention is judged).

Every task gives (x (count, length, channels), y) for a split: "train", "length" (twice the length), "value" (values ten times as large), or
"adversarial" (values moved by up to a tenth, and the answer computed anew).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import RegardError

SPLITS = ("train", "length", "value", "adversarial")


def drawn(split: str, count: int, shape: tuple[int, ...], generator: torch.Generator, integer: bool) -> Tensor:
    """Values in [1, 10), ten times as large for "value"; perturbed for "adversarial"."""
    if split not in SPLITS:
        raise RegardError(f"split={split!r}; expected one of {', '.join(SPLITS)}")
    values = 1 + 9 * torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    values = values.floor() if integer else values
    if split == "value":
        values = 10 * values
    if split == "adversarial":
        moved = values * (1 + 0.1 * (2 * torch.rand(values.shape, generator=generator, dtype=torch.float64) - 1))
        values = moved.round().clamp_min(1) if integer else moved
    return values


def shortest_paths(weights: Tensor) -> Tensor:
    """All-pairs distances (..., n, n) of edge weights (..., n, n), infinite where there is no edge: Floyd-Warshall."""
    distance = weights.clone()
    distance.diagonal(dim1=-2, dim2=-1).zero_()
    for middle in range(weights.shape[-1]):
        distance = torch.minimum(distance, distance[..., :, middle : middle + 1] + distance[..., middle : middle + 1, :])
    return distance


def floyd_warshall(split: str = "train", count: int = 64, length: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x: rows of complete weighted digraphs (count, n, n), zeros padded to twice `length` columns; y: their all-pairs distances."""
    n, generator = length * (2 if split == "length" else 1), torch.Generator().manual_seed(seed)
    weights = drawn(split, count, (n, n), generator, False)
    weights.diagonal(dim1=-2, dim2=-1).zero_()
    return torch.nn.functional.pad(weights, (0, 2 * length - n)), shortest_paths(weights)


def knapsack(split: str = "train", count: int = 64, length: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x: items (weight, value, capacity); y: the best total value within the capacity, (count,)."""
    n, generator = length * (2 if split == "length" else 1), torch.Generator().manual_seed(seed)
    weight, value = (drawn(split, count, (n,), generator, True) for _ in range(2))
    capacity = (weight.sum(-1) / 2).floor()
    best = torch.zeros(count, int(capacity.max()) + 1, dtype=torch.float64)
    room = torch.arange(best.shape[1])
    for item in range(n):
        w = weight[:, item].long()[:, None]
        taken = best.gather(1, (room - w).clamp_min(0)) + value[:, item, None]
        best = torch.where(room >= w, torch.maximum(best, taken), best)
    x = torch.stack((weight, value, capacity[:, None].expand_as(weight)), -1)
    return x, best.gather(1, capacity.long()[:, None]).squeeze(1)


def subset_sum(split: str = "train", count: int = 64, length: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x: numbers and a target; y: whether some numbers add up to the target, 0 or 1, (count,)."""
    n, generator = length * (2 if split == "length" else 1), torch.Generator().manual_seed(seed)
    numbers = drawn(split, count, (n,), generator, True)
    target = (numbers.sum(-1) * (0.2 + 0.6 * torch.rand(count, generator=generator, dtype=torch.float64))).floor()
    reach = torch.zeros(count, int(numbers.sum(-1).max()) + 1, dtype=torch.bool)
    reach[:, 0] = True
    place = torch.arange(reach.shape[1])
    for item in range(n):
        a = numbers[:, item].long()[:, None]
        reach = reach | (reach.gather(1, (place - a).clamp_min(0)) & (place >= a))
    x = torch.stack((numbers, target[:, None].expand_as(numbers)), -1)
    return x, reach.gather(1, target.long()[:, None]).squeeze(1).double()


TASKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"floyd_warshall": floyd_warshall, "knapsack": knapsack, "subset_sum": subset_sum}
