"""Neighbourhoods on a 1-D, 2-D or 3-D grid, with stride, dilation and causal axes (generalized neighbourhood attention)."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .mask import Bounds, Mask, spans
from .part import Sizes, described
from .permute import grid_order
from .snapshot import remembered

TILE = 64  # tokens of a tile when a grid is laid out tile by tile


@dataclass(frozen=True, eq=False)
class Interval:
    """A query x sees a key y only if first[x] <= at[y] <= last[x]; each (tokens of the grid,), integers."""

    first: Tensor
    last: Tensor
    at: Tensor


@described
class Neighborhood(Mask):
    """Each token of a grid sees a window of `kernel` tokens an axis around it (Hassani et al., 2025).

    shape: the grid, row-major in the sequence; None is a line as long as the keys (and kernel is cut to it). kernel, stride, dilation, causal_axes: a value an axis (one value serves all).
    1 <= stride <= kernel: stride 1 is the plain neighbourhood, stride = kernel blocked attention. kernel * dilation must fit
    the axis. extra: keys appended after the grid, visible to every query; queries are the grid's tokens. tile: the sequence holds
    the grid tile by tile, as `permute.grid_order` lays it, and not row by row (None).
    """

    shape: tuple[int, ...] | None = None
    kernel: int | tuple[int, ...] = 13
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal_axes: bool | tuple[bool, ...] = False
    extra: int = 0
    tile: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = len(self.shape or (1,))
        for name in ("kernel", "stride", "dilation", "causal_axes"):
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
            if len(value) != axes:
                raise RegardError(f"Neighborhood {name}={value}: expected one value, or {axes} as in shape={self.shape}")
            object.__setattr__(self, name, value)
        for length, kernel, stride, dilation in zip(self.shape or (10**9,), *self.axes[:3], strict=True):
            if not (1 <= stride <= kernel and kernel >= 1 and dilation >= 1 and kernel * dilation <= length):
                raise RegardError(
                    f"Neighborhood axis of {length} with kernel={kernel}, stride={stride}, dilation={dilation}: "
                    f"expected 1 <= stride <= kernel and kernel * dilation <= {length}"
                )

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        """kernel, stride, dilation and causality, a value an axis."""
        return self.kernel, self.stride, self.dilation, self.causal_axes  # type: ignore[return-value]

    @property
    def total(self) -> int:
        return math.prod(self.shape or (0,))

    def intervals(self, total: int) -> tuple[Interval, ...]:
        """What decides, axis by axis, on a grid of `total` tokens."""
        return intervals(self.shape or (total,), *self.axes, self.tile)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        total = self.total or env["k_len"] - self.extra
        if env.get("k_len", total + self.extra) != total + self.extra:
            raise RegardError(
                f"Neighborhood(shape={self.shape}, extra={self.extra}) got {env['k_len']} keys; expected {total + self.extra}"
            )
        # With extra keys at the end, alignment to the end of the keys shifts the queries by `extra`.
        x, y = (i - self.extra).clamp(0, total - 1), j.clamp(max=total - 1)
        seen = (i == i) & (j < total)
        for part in self.intervals(total):
            first, last, at = (table.to(i.device) for table in (part.first, part.last, part.at))
            seen = seen & (at[y] >= first[x]) & (at[y] <= last[x])
        return seen | (j >= total)

    @property
    def names(self) -> list[tuple[str, str, str]]:
        """The side inputs' names of each interval, the mask's own."""
        own = f"mask_near{zlib.crc32(repr(self).encode())}"
        count = 0 if self.shape is None else len(self.intervals(self.total))
        return [(f"{own}_first{n}", f"{own}_last{n}", f"{own}_at{n}") for n in range(count)]

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return tuple(pair for first, last, at in self.names for pair in ((first, "q"), (last, "q"), (at, "k")))

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        found, rows = {}, torch.arange(self.total - q_len, self.total).clamp(min=0)
        for (first, last, at), part in zip(self.names, self.intervals(self.total), strict=True):
            found[first], found[last] = (x[rows, None].to(device) for x in (part.first, part.last))
            found[at] = torch.nn.functional.pad(part.at, (0, self.extra)).to(device)
        return {name: x[(None,) * (4 - x.dim())] for name, x in found.items()}

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        if self.shape is None:
            raise RegardError("Neighborhood(shape=None): its grid is as long as the keys; give its shape to print it into a kernel")
        tests = [(sides[at] >= sides[first]) & (sides[at] <= sides[last]) for first, last, at in self.names]
        seen = functools.reduce(lambda one, other: one & other, tests)
        return seen | (j >= self.total) if self.extra else seen

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds | None:
        if self.shape is None:
            return None
        last, beyond = self.total - 1, j1 > self.total - 1
        queries, keys = spans(i0 - self.extra, i1 - self.extra, last), spans(j0, j1, last)
        some = every = (i0 == i0) & (j0 == j0)
        for part in self.intervals(self.total):
            low, high = (part.at.to(j0.device)[keys].amin(-1), part.at.to(j0.device)[keys].amax(-1))
            first, stop = (x.to(i0.device)[queries] for x in (part.first, part.last))
            some = some & (first.amin(-1) <= high) & (stop.amax(-1) >= low)
            every = every & (first.amax(-1) <= low) & (stop.amin(-1) >= high)
        whole = j0 > last
        return some | beyond, (every & ~beyond) | whole

    def arranged(self, sizes: Sizes) -> tuple[Neighborhood, Tensor] | None:
        axes = len(self.shape or ())
        spread = axes > 1 or max(self.axes[2]) > 1
        if self.tile is not None or self.shape is None or not spread or (sizes.q_len, sizes.k_len) != (self.total, self.total + self.extra):
            return None
        if 2 * math.prod(self.axes[0]) > self.total:
            return None  # nearly everything is seen, whatever the order
        aim = round(TILE ** (1 / axes))
        tile = tuple(tile_side(-(-length // dilation), aim) for length, dilation in zip(self.shape, self.axes[2], strict=True))
        return replace(self, tile=tile), grid_order(self.shape, tile, self.axes[2], self.extra)

    @property
    def causal(self) -> bool:
        return len(self.shape or (1,)) == 1 and self.axes[3][0] and not self.extra


def window_of(x: Tensor, members: Tensor, kernel: int, stride: int, causal: bool) -> tuple[Tensor, Tensor]:
    """First and last coordinate that a query at x sees on an axis of `members` tokens.

    Queries of a stride group share the window of their leader. A non-causal window is shifted inwards at the borders, so it
    always holds `kernel` keys; a causal one ends at the query itself.
    """
    group = torch.div(x, stride, rounding_mode="floor") * stride
    if causal:
        leader = torch.minimum(group + stride - 1, members - 1)
        return (leader - kernel + 1).clamp(min=0), x
    leader = torch.minimum(group + stride // 2, members - 1)
    right = kernel // 2 + kernel % 2 - 1
    start = (leader - kernel // 2).clamp(min=0)
    start = start + torch.where(leader + right >= members, members - right - leader - 1, 0)
    return start, start + kernel - 1


@remembered(maxsize=64)
def intervals(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    tile: tuple[int, ...] | None,
) -> tuple[Interval, ...]:
    """The windows of a grid's tokens on each axis and, where it is dilated, their groups; in the order of the sequence."""
    total, inner, found = math.prod(shape), math.prod(shape), []
    place = torch.arange(total) if tile is None else grid_order(shape, tile, dilation)
    for length, k, s, d, c in zip(shape, kernel, stride, dilation, causal, strict=True):
        k, s = min(k, length // d), min(s, length // d)
        inner //= length
        x = (place // inner) % length
        group, at = x % d, x // d
        first, last = window_of(at, (length - group + d - 1) // d, k, s, c)
        found.append(Interval(first, last, at))
        if d > 1:
            found.append(Interval(group, group, group))
    return tuple(found)


def tile_side(length: int, aim: int) -> int:
    """The divisor of an axis nearest to `aim`, or `aim` itself where none is near."""
    near = [side for side in range(max(1, aim // 2), 2 * aim + 1) if length % side == 0]
    return min(near, key=lambda side: abs(side - aim), default=min(aim, length))
