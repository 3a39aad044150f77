"""Masks by position: causal, windows, strides, blocks, sinks, columns and blocks at powers of two, and their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .mask import Bounds, Mask, positive
from .part import described


@described
class Causal(Mask):
    """j <= i."""

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return j <= i

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        return j0 <= i1, j1 <= i0

    def counts(self, inputs: Mapping[str, Tensor], i: Tensor, k_len: int) -> Tensor:
        return (i + 1).clamp(min=0)[None, None]

    @property
    def causal(self) -> bool:
        return True

    @property
    def relative(self) -> bool:
        return True


@described
class Window(Mask):
    """|i - j| < size; with Causal() the last `size` keys, the query's own included."""

    size: int

    def __post_init__(self) -> None:
        positive(self, "size")

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return (i - j).abs() < self.size

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        near = (i0 - j1 < self.size) & (j0 - i1 < self.size)
        return near, (i1 - j0 < self.size) & (j1 - i0 < self.size)

    @property
    def relative(self) -> bool:
        return True


@described
class Dilated(Mask):
    """Every `dilation`-th key within `size` steps of that length: |i - j| < size * dilation and dilation | (i - j)."""

    size: int
    dilation: int

    def __post_init__(self) -> None:
        positive(self, "size", "dilation")

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return ((i - j).abs() < self.size * self.dilation) & ((i - j) % self.dilation == 0)

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        some, every = Window(self.size * self.dilation).bounds(i0, i1, j0, j1)
        return some & multiple_between(i0 - j1, i1 - j0, self.dilation), every & (self.dilation == 1)

    @property
    def relative(self) -> bool:
        return True


@described
class Strided(Mask):
    """(i - j) mod stride == 0."""

    stride: int

    def __post_init__(self) -> None:
        positive(self, "stride")

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return (i - j) % self.stride == 0

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        single = (i0 == i1) & (j0 == j1)
        hit = (i0 - j0) % self.stride == 0
        return multiple_between(i0 - j1, i1 - j0, self.stride), (single & hit) | ((i0 <= i1) & (self.stride == 1))

    @property
    def relative(self) -> bool:
        return True


@described
class FixedBlock(Mask):
    """i and j lie in the same block of `size` positions; blocks begin at `start`, a part of one before it."""

    size: int
    start: int = 0

    def __post_init__(self) -> None:
        positive(self, "size")
        if not isinstance(self.start, int) or not 0 <= self.start < self.size:
            raise RegardError(f"FixedBlock(start={self.start!r}): expected 0 to size - 1 = {self.size - 1}")

    def block(self, i: Tensor) -> Tensor:
        return (i - self.start) // self.size if self.start else i // self.size

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return self.block(i) == self.block(j)

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        a0, a1, c0, c1 = (self.block(x) for x in (i0, i1, j0, j1))
        return (a0 <= c1) & (c0 <= a1), (a0 == a1) & (c0 == c1) & (a0 == c0)


@described
class Columns(Mask):
    """Summary columns of each block: j mod size in [start, start + count)."""

    size: int
    count: int
    start: int = 0

    def __post_init__(self) -> None:
        positive(self, "size", "count")
        if self.start < 0 or self.start + self.count > self.size:
            raise RegardError(f"Columns(start={self.start}, count={self.count}): expected them inside a block of size={self.size}")

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        place = j % self.size
        return (place >= self.start) & (place < self.start + self.count) & (i == i)

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        first = (j0 - self.start) % self.size
        inside = (first < self.count) & (i0 <= i1)
        return inside | (first + (j1 - j0) >= self.size), inside & (first + (j1 - j0) < self.count)


@described
class Sinks(Mask):
    """The first `count` keys."""

    count: int

    def __post_init__(self) -> None:
        positive(self, "count")

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return (j < self.count) & (i == i)

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        return (j0 < self.count) & (i0 <= i1), (j1 < self.count) & (i0 <= i1)


@described
class Prefix(Sinks):
    """Everyone sees the first `count` keys; `Causal() | Prefix(n)` is the prefix language model's mask."""


@described
class BlockPowers(Mask):
    """Blocks of `size`: a query block reads the key blocks 0, 1, 2, 4, 8, ... blocks back, the last `window` and the first `sinks`."""

    size: int
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        positive(self, "size")

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return self.keeps(i // self.size, j // self.size)

    def keeps(self, u: Tensor, w: Tensor) -> Tensor:
        back = u - w
        return (back >= 0) & (((back & (back - 1)) == 0) | (back < self.window) | (w < self.sinks))

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds | None:
        if not bool((i0 // self.size == i1 // self.size).all() & (j0 // self.size == j1 // self.size).all()):
            return None  # blocks of another size: look at the pairs
        whole = self.keeps(i0 // self.size, j0 // self.size)
        return whole, whole

    @property
    def causal(self) -> bool:
        return self.size == 1


def multiple_between(low: Tensor, high: Tensor, step: int) -> Tensor:
    """Whether [low, high] holds a multiple of `step`."""
    return torch.div(high, step, rounding_mode="floor") * step >= low
