"""Inputs, and the weights of given scores."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal, Mechanism, RowWise
from regard.catalog import get
from regard.engine.door import attend
from regard.lab.checks.shared.comparing import F64


def qkv(n: int = 37, d: int = 8, heads: int = 2, std: float = 1.0, m: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(std * torch.randn(1, heads, length, d, dtype=F64) for length in (n, m or n, m or n))  # type: ignore[return-value]


def identity_values(n: int, heads: int = 1) -> Tensor:
    """Values that make the output the weights themselves."""
    return torch.eye(n, dtype=F64).expand(1, heads, n, n)


def weights_of(s: Tensor, mechanism: str | Mechanism, mask: Causal | None = None, **inputs: Tensor) -> Tensor:
    """Weights of given scores (n, m): q carries the scores, k and v are identities."""
    m = s.shape[1]
    found = get(mechanism) if isinstance(mechanism, str) else mechanism
    executor = "rows" if isinstance(getattr(found, "normalizer", None), RowWise) else "tiled"
    return attend(s[None, None], identity_values(m), identity_values(m), found, scale=1.0, mask=mask, executor=executor, **inputs)[0, 0]
