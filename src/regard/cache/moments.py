"""The first two moments of keys, and what they say of the mass that a query gives to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Of keys: count (...), total (..., D), outer (..., D, D), in float64."""

    count: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, keys: Tensor, real: Tensor) -> Moments:
        """keys (..., n, D), real (..., n) bool: those that count."""
        k = torch.where(real[..., None], keys, 0.0).double()
        return cls(real.sum(-1).double(), k.sum(-2), k.mT @ k)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count.clamp_min(1)[..., None]

    @property
    def covariance(self) -> Tensor:
        return self.outer / self.count.clamp_min(1)[..., None, None] - self.mean[..., :, None] * self.mean[..., None, :]

    def log_mass(self, q: Tensor, count: Tensor, scale: float, second: bool = True) -> Tensor:
        """log of the sum of exp(scale q.k) over `count` (...) such keys, for q (..., g, D): (..., g); -inf for none. second: with the covariance."""
        q = q.double()
        exponent = scale * (q @ self.mean[..., None])[..., 0]
        if second:
            exponent = exponent + scale**2 * ((q @ self.covariance) * q).sum(-1) / 2
        return count.double().log()[..., None] + exponent
