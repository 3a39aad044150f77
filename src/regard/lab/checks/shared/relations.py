"""Random tables of relative positions."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab.checks.shared.comparing import F64


def tables(reach: int, heads: int, d: int) -> dict[str, Tensor]:
    shapes = {"content": (heads, d), "table": (2 * reach, heads, d), "apart": (2 * reach, heads)}
    return {name: torch.randn(shape, dtype=F64) / 2 for name, shape in shapes.items()}
