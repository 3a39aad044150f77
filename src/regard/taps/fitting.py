"""Parts that learn from a pretrained model's own queries, keys and values, a part a layer, while the model stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.reference import repeat_heads
from ..errors import RegardError
from .session import read

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # (part, q, k, v) (B, H, L, D) -> a number


def fit_to_heads(
    model: nn.Module,
    parts: Mapping[int, nn.Module],
    loss: Loss,
    draw: Callable[[torch.Generator], Any],
    steps: int,
    *,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[int, list[float]]:
    """Train parts by layer number on loss(part, q, k, v), by Adam; returns each one's losses. The model runs without gradients, in evaluation mode, and is
    left in the modes it had.

    draw(generator) gives token ids (B, L) without padding, or the model's keyword arguments. k and v are repeated for the query heads that share them.
    RegardError: no parts, no steps, a loss that is no number.
    """
    if not parts or steps < 1:
        raise RegardError(f"parts has {len(parts)} layers, steps={steps}; expected at least one of each")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for part in parts.values() for p in part.parameters()], lr)
    modes = {module: module.training for module in model.modules()}
    losses: dict[int, list[float]] = {layer: [] for layer in parts}
    try:
        model.eval()
        for _ in range(steps):
            batch = draw(generator)
            with torch.no_grad(), read(model, ["q", "k", "v"], layers=list(parts)) as seen:
                model(**batch) if isinstance(batch, dict) else model(batch)
            found = {}
            for layer, part in parts.items():
                q = seen["q", layer]
                k, v = (repeat_heads(seen[name, layer], q.shape[1]) for name in "kv")
                found[layer] = loss(part, q, k, v)
            if not all(bool(x.isfinite()) for x in found.values()):
                raise RegardError(
                    f"the loss became { ({n: float(x) for n, x in found.items()}) }; expected numbers (a smaller lr than {lr:g}?)"
                )
            optimizer.zero_grad()
            torch.stack(list(found.values())).sum().backward()
            optimizer.step()
            for layer, x in found.items():
                losses[layer].append(x.item())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return losses
