"""Inputs and identities for attention through fewer tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab.checks.shared.comparing import F64


def qkv(n: int, d: int = 8, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, heads, n, d, dtype=F64) for _ in range(3))  # type: ignore[return-value]


def eye(n: int, heads: int = 2) -> Tensor:
    return torch.eye(n, dtype=F64).expand(1, heads, n, n)
