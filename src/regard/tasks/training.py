"""Small training runs on drawn data, with fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import RegardError

Model = TypeVar("Model", bound=nn.Module)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def fit(
    model: nn.Module,
    draw: Callable[[torch.Generator], Any],
    loss: Callable[[Any], Tensor],
    steps: int,
    *,
    lr: float = 1e-3,
    seed: int = 0,
    optimizer: str = "adam",
    watch: Callable[[int], None] | None = None,
    **options: Any,
) -> list[float]:
    """Train `model` for `steps` steps on `loss(draw(generator))` and give the losses; the model is left in evaluation mode.

    watch(step) is called before each step and once behind the last. options: of the optimizer ("adam", "adamw" or "sgd").
    """
    if optimizer not in OPTIMIZERS:
        raise RegardError(f"optimizer={optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
    if steps < 0:
        raise RegardError(f"steps={steps}; expected 0 or more")
    generator = torch.Generator().manual_seed(seed)
    chosen = OPTIMIZERS[optimizer](model.parameters(), lr=lr, **options)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        if watch is not None:
            watch(step)
        now = loss(draw(generator))
        chosen.zero_grad()
        now.backward()
        chosen.step()
        losses.append(now.item())
    model.eval()
    if watch is not None:
        watch(steps)
    return losses
