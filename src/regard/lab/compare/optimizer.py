"""The optimizer of small models: Muon for matrices, AdamW for the rest (Jordan et al., 2024; Loshchilov & Hutter, 2019)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.sharding import gathered, spread

QUINTIC = (3.4445, -4.7750, 2.0315)  # the coefficients of Muon's Newton-Schulz iteration


def orthogonal(g: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About U V^T of each matrix U S V^T of (n, rows, columns): x <- a x + (b A + c A^2) x with A = x x^T, from x = g / |g|."""
    a, b, c = QUINTIC
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Nesterov momentum, made orthogonal, times lr sqrt(max(1, rows / columns))) in the dtype of the parameters and for all matrices of
    one shape at once: PyTorch's own iterates in bfloat16, matrix by matrix, which on a CPU takes longer than the model's whole step. Matrices that
    FSDP2 has sharded keep their momentum sharded and are whole while they are made orthogonal."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, params in alike.items():
                grads = torch.stack([p.grad for p in params])  # type: ignore[misc]
                state = self.state[params[0]]
                state["momentum"] = state.get("momentum", torch.zeros_like(grads)).lerp(grads, 1 - group["momentum"])
                update = orthogonal(gathered(grads.lerp(state["momentum"], group["momentum"])))
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for p, direction in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(spread(direction, p, source=None), alpha=rate)
