"""A row of weights by mean and deviation."""

from __future__ import annotations

import math

from torch import Tensor


def nap_row(s: Tensor, gain: float = 1.3, shift: float = 0.2) -> Tensor:
    mean = s.sum() / len(s)
    return gain * (s - mean) / (math.sqrt(((s - mean) ** 2).sum() / len(s)) + 1e-3) + shift
