"""Masks that compare a query's position with a number of each key: tokens that die, and keys out of order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .mask import Bounds, Mask, spans
from .part import Input, described


@described
class KeyTime(Mask):
    """Base: a number of each key, the one input (B, H, Lk)."""

    @property
    def name(self) -> str:
        return self.inputs[0].name  # type: ignore[attr-defined, no-any-return]

    def time_of(self, b: Tensor, h: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        times = env[self.name]
        at = [index if size > 1 else torch.zeros_like(index) for index, size in zip((b, h), times.shape, strict=False)]
        return times[at[0], at[1], 0, j]  # type: ignore[no-any-return]

    def extremes(self, inputs: Mapping[str, Tensor], j0: Tensor, j1: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest number in each block of keys, (B or 1, H or 1, 1, key blocks)."""
        times = inputs[self.name]
        times = times[..., spans(j0, j1, times.shape[-1] - 1)]
        return times.amin(-1), times.amax(-1)

    def passed(self, inputs: Mapping[str, Tensor], i: Tensor, right: bool) -> Tensor:
        """How many keys' numbers lie below each of i (Lq,), equal ones included (`right`), (B or 1, H or 1, Lq)."""
        times = inputs[self.name][..., 0, :].sort(-1).values
        return torch.searchsorted(times, i.to(times.dtype).expand(*times.shape[:-1], -1).contiguous(), right=right)

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return (("mask_" + self.name, "bhk"),)

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        return {"mask_" + self.name: inputs[self.name]}

    @property
    def depends(self) -> str:
        return "bh"


@described
class Lifetime(KeyTime):
    """Key j is read up to query until[b, h, j] (absolute positions): tokens that die. Input `until` (B, H, Lk), integers."""

    inputs: tuple[Input, ...] = (Input("until", "bhk", dtype="int"),)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return i <= self.time_of(b, h, j, env)

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return i <= sides["mask_until"]

    def bounds_of(self, inputs: Mapping[str, Tensor], i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        low, high = self.extremes(inputs, j0, j1)
        return i0 <= high, i1 <= low

    def counts(self, inputs: Mapping[str, Tensor], i: Tensor, k_len: int) -> Tensor:
        return k_len - self.passed(inputs, i, right=False)


@described
class Since(KeyTime):
    """Key j is read from query since[b, h, j] on (absolute positions): keys out of order. Input `since` (B, H, Lk), integers."""

    inputs: tuple[Input, ...] = (Input("since", "bhk", dtype="int"),)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return i >= self.time_of(b, h, j, env)

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return i >= sides["mask_since"]

    def bounds_of(self, inputs: Mapping[str, Tensor], i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        low, high = self.extremes(inputs, j0, j1)
        return i1 >= low, i0 >= high

    def counts(self, inputs: Mapping[str, Tensor], i: Tensor, k_len: int) -> Tensor:
        return self.passed(inputs, i, right=True)
