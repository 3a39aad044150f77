"""Short training runs of checks: a fresh batch a step, fixed seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def trained(
    make: Callable[[], nn.Module],
    draw: Draw,
    steps: int,
    *,
    seed: int = 0,
    batch: int = 64,
    lr: float = 1e-3,
    loss: Loss = F.cross_entropy,
    weight_decay: float = 0.0,
) -> nn.Module:
    """A model made under `seed` and trained by AdamW on fresh batches under a one-cycle rate; in evaluation mode."""
    torch.manual_seed(seed)
    model = make().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        x, y = draw(batch, generator)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, draw: Draw, count: int = 1000, seed: int = 10_000) -> float:
    x, y = draw(count, torch.Generator().manual_seed(seed))
    return float((model(x).argmax(-1) == y).double().mean())


@torch.no_grad()
def error(model: nn.Module, draw: Draw, count: int = 200, seed: int = 10_000) -> float:
    """Mean squared error on held-out draws."""
    x, y = draw(count, torch.Generator().manual_seed(seed))
    return float((model(x) - y).square().mean())


def middle(run: Callable[[int], float], seeds: Iterable[int] = (0, 1, 2)) -> float:
    """The median over seeds."""
    return statistics.median(run(seed) for seed in seeds)
