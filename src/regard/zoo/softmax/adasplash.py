"""AdaSplash: alpha-entmax that looks for each row's threshold by Halley's method and skips tiles of zeros (id 110; Goncalves et al., 2025).

p_ij = ((alpha - 1) s_ij - tau_i)_+^(1 / (alpha - 1)),   tau_i such that the row sums to one
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regard.algebra import Weighted
from regard.algebra.thresholds import ActiveTiles, halley
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.zoo.softmax.entmax import entmax, safe_power


@register("adasplash")
def adasplash(alpha: float = 1.5, block_size: int = 64, iterations: int = 8) -> Weighted:
    """First pass: thresholds, `iterations` Halley steps, and which tiles of block_size hold any weight. Second pass: those tiles alone,
    forward and backward; memory is one row of tiles. Packed sequences: mask=Segments(). `entmax` is the same map without skipping."""
    return replace(entmax(alpha), select=ActiveTiles(alpha, block_size, iterations))


def entmax_halley(z: Tensor, alpha: float = 1.5, iterations: int = 8, dim: int = -1) -> Tensor:
    """alpha-entmax of logits along `dim`, its threshold by `iterations` Halley-bisection steps; differentiable in z."""
    if alpha <= 1 or iterations < 1:
        raise RegardError(f"alpha={alpha}, iterations={iterations}: expected alpha > 1 and at least one iteration")
    z = z.movedim(dim, -1)
    tau = halley(z, torch.ones_like(z, dtype=torch.bool), alpha, iterations)
    x, power = (alpha - 1) * z, torch.tensor(1 / (alpha - 1), dtype=z.dtype, device=z.device)
    gap = (x - tau).clamp_min(0)
    # dtau = sum u dx / sum u with u = p^(2 - alpha): carried by a term whose value is zero.
    u = torch.where(gap > 0, safe_power(gap, power).detach() ** (2 - alpha), 0.0)
    share = u / u.sum(-1, keepdim=True)
    tau = tau + (share * (x - x.detach())).sum(-1, keepdim=True)
    return safe_power((x - tau).clamp_min(0), power).movedim(-1, dim)
