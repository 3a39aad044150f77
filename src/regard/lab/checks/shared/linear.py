"""Rows of unit length."""

from __future__ import annotations

from torch import Tensor


def unit_rows(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()
