"""Readouts of recurrences that several systems share: plain functions of o_t and its moments."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_divided(o: Tensor, mass: Tensor, eps: float) -> Tensor:
    """o / (mass + eps)."""
    return o / (mass + eps)


def mean_divided(o: Tensor, mass: Tensor, n: Tensor, eps: float) -> Tensor:
    """o / (mass + n eps): sums as means, and eps added to the divisor."""
    return o / (mass + n * eps)


def smoothed(o: Tensor, mass: Tensor, query_sum: Tensor, causal: bool, eps: float) -> Tensor:
    """o / (phi_q.(sum phi_k + eps)) in a causal call, o / mass in both directions."""
    mass = mass + eps * query_sum if causal else mass
    return o / mass.masked_fill(mass == 0, 1.0)


def over_count(o: Tensor, n: Tensor) -> Tensor:
    return o / n


def ratio(o: Tensor, mass: Tensor) -> Tensor:
    """o / mass, of either sign; rows that see nothing give zero."""
    return o / torch.where(mass == 0, 1.0, mass)
