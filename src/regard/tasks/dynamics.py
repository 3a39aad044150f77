"""Sequences from simple dynamics: noisy oscillators to be filtered, and regressions whose law changes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def oscillator(
    count: int, length: int, seed: int = 0, frequency: float = 0.35, damping: float = 0.01, process: float = 0.0, noise: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(observed, true) (count, length, 2): dx = A dx dt + process noise, A = [[-damping, -frequency], [frequency, -damping]], sampled each unit of
    time, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(count, generator=generator) * 2 * math.pi
    x = torch.stack((angle.cos(), angle.sin()), -1)
    cos, sin, fade = math.cos(frequency), math.sin(frequency), math.exp(-damping)
    flow = fade * torch.tensor([[cos, -sin], [sin, cos]])
    path = []
    for _ in range(length):
        path.append(x)
        x = x @ flow.T + process * torch.randn(count, 2, generator=generator)
    true = torch.stack(path, 1)
    return true + noise * torch.randn(true.shape, generator=generator), true


def van_der_pol(
    count: int, length: int, seed: int = 0, strength: float = 1.0, step: float = 0.1, noise: float = 0.2
) -> tuple[Tensor, Tensor]:
    """(observed, true) (count, length, 2): x'' = strength (1 - x^2) x' - x by Runge-Kutta steps, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(count, 2, generator=generator)

    def slope(x: Tensor) -> Tensor:
        return torch.stack((x[:, 1], strength * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0]), -1)

    path = []
    for _ in range(length):
        path.append(x)
        a = slope(x)
        b = slope(x + step / 2 * a)
        c = slope(x + step / 2 * b)
        x = x + step / 6 * (a + 2 * b + 2 * c + slope(x + step * c))
    true = torch.stack(path, 1)
    return true + noise * torch.randn(true.shape, generator=generator), true


def switching_regression(length: int, dim: int, segments: int, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    """(k, v) (1, 1, length, dim): keys around a centre of norm 2 that changes with the segment, values linear in them by its own map."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = [], []
    for at in range(segments):
        count = length * (at + 1) // segments - length * at // segments
        centre = torch.randn(dim, generator=generator, dtype=torch.float64)
        k = 2 * centre / centre.norm() + spread * torch.randn(count, dim, generator=generator, dtype=torch.float64)
        keys.append(k)
        values.append(
            k @ torch.randn(dim, dim, generator=generator, dtype=torch.float64) + torch.randn(dim, generator=generator, dtype=torch.float64)
        )
    return torch.cat(keys)[None, None], torch.cat(values)[None, None]
