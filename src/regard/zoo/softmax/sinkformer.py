"""Sinkformer: doubly stochastic attention by Sinkhorn's iterations (id 22; Sander et al., 2021). Not causal.

A = n exp(C + f + g),   f, g by alternately normalising rows and columns; one iteration is softmax
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.algebra import Sinkhorn, Weighted
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.engine.weights import weights
from regard.errors import RegardError
from regard.plots import figure


@register("sinkformer")
def sinkformer(iterations: int = 3, detach_columns: bool = False) -> Weighted:
    """iterations: single normalisations, rows first; 3 or 5 as in the paper, 21 and more to converge."""
    return Weighted(normalizer=Sinkhorn(iterations, detach_columns))


@dataclass(frozen=True)
class FlowResult:
    """points: (steps + 1, n, d). energy: W after each step. asymmetry: |J - J^T| / |J| of the field's Jacobian at the start."""

    points: Tensor
    energy: tuple[float, ...]
    asymmetry: float

    def plot(self) -> str:
        """The energy after each step as an SVG."""
        return figure("Energy of the flow", "step", "energy", {"W": [(float(n), x) for n, x in enumerate(self.energy)]})


def attention_flow(x: Tensor, m: Tensor, *, iterations: int = 101, steps: int = 20, step_size: float = 0.1) -> FlowResult:
    """Follow n particles x (n, d) under scores x^T M x, M (d, d) symmetric. iterations: of Sinkhorn; 1 is softmax."""
    if x.dim() != 2 or m.shape != (x.shape[1], x.shape[1]) or not torch.allclose(m, m.T):
        raise RegardError(f"x {tuple(x.shape)}, m {tuple(m.shape)}: expected x (n, d) and a symmetric m (d, d)")
    mechanism = get("sinkformer", iterations=iterations)

    def field(points: Tensor) -> Tensor:
        y = points[None, None]
        return -attend(y @ m, y, y @ m, mechanism, scale=1.0)[0, 0]

    def energy(points: Tensor) -> float:
        y = points[None, None]
        a = weights(y @ m, y, mechanism, scale=1.0)
        assert a is not None
        return float((a[0, 0] * (points @ m @ points.T)).sum() - torch.special.xlogy(a, a).sum())

    jacobian = torch.autograd.functional.jacobian(field, x).flatten(2).flatten(0, 1)
    asymmetry = float((jacobian - jacobian.T).norm() / jacobian.norm())
    path, falling = [x], [energy(x)]
    with torch.no_grad():
        for _ in range(steps):
            path.append(path[-1] + step_size * field(path[-1]))
            falling.append(energy(path[-1]))
    return FlowResult(torch.stack(path), tuple(falling), asymmetry)
