"""Attention inputs with known structure: what block policies are measured on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

F64 = torch.float64


def autoregressive(length: int, dim: int, coefficient: float, generator: torch.Generator | None = None) -> Tensor:
    """x_t = c x_{t-1} + sqrt(1 - c^2) e_t, unit variance, (length, dim)."""
    noise = torch.randn(length, dim, dtype=F64, generator=generator)
    rows = [noise[0]]
    for t in range(1, length):
        rows.append(coefficient * rows[-1] + math.sqrt(1 - coefficient**2) * noise[t])
    return torch.stack(rows)


def clustered(length: int, dim: int, centres: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that repeat `centres` cluster centres length / centres times in a row (those of queries in another order), plus noise."""
    middle = torch.randn(centres, dim, dtype=F64, generator=generator)
    middle = middle / middle.norm(dim=-1, keepdim=True) * math.sqrt(dim)
    times = length // centres
    order = torch.randperm(centres, generator=generator)
    q, k = (
        0.9 * x.repeat_interleave(times, 0) + 0.3 * torch.randn(length, dim, dtype=F64, generator=generator)
        for x in (middle[order], middle)
    )
    return q[None, None], k[None, None], torch.randn(1, 1, length, dim, dtype=F64, generator=generator)


def local_and_columns(length: int = 1024, columns: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A causal head of D = 40: 8 channels that q and k share and that drift slowly, a constant query direction, random keys strong along it."""
    generator = torch.Generator().manual_seed(seed)
    local = 2.5 * autoregressive(length, 8, 0.95, generator)
    direction = torch.nn.functional.normalize(torch.randn(32, dtype=F64, generator=generator), dim=0)
    q, k = (torch.cat((local, 0.3 * torch.randn(length, 32, dtype=F64, generator=generator)), -1) for _ in range(2))
    q[:, 8:] += 6 * direction
    strong = torch.randperm(length, generator=generator)[:columns]
    k[strong, 8:] += 6 * direction
    return q[None, None], k[None, None], torch.randn(1, 1, length, 40, dtype=F64, generator=generator)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((out - truth).norm() / truth.norm())
