"""Neighbourhoods on a 1-D, 2-D or 3-D grid, with stride, dilation and causal axes (generalized neighbourhood attention)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .mask import Bounds, Mask
from .part import described


@described
class Neighborhood(Mask):
    """Each token of a grid sees a window of `kernel` tokens an axis around it (Hassani et al., 2025).

    shape: the grid, row-major in the sequence; None is a line as long as the keys (and kernel is cut to it). kernel, stride, dilation, causal_axes: a value an axis (one value serves all).
    1 <= stride <= kernel: stride 1 is the plain neighbourhood, stride = kernel blocked attention. kernel * dilation must fit
    the axis. extra: keys appended after the grid, visible to every query; queries are the grid's tokens.
    """

    shape: tuple[int, ...] | None = None
    kernel: int | tuple[int, ...] = 13
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal_axes: bool | tuple[bool, ...] = False
    extra: int = 0

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

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        shape = self.shape or (env["k_len"] - self.extra,)
        total = math.prod(shape)
        # With extra keys at the end, alignment to the end of the keys shifts the queries by `extra`.
        i = i - self.extra
        seen = (i == i) & (j < total)
        inner = total
        for length, kernel, stride, dilation, causal in zip(shape, *self.axes, strict=True):
            kernel, stride = min(kernel, length // dilation), min(stride, length // dilation)
            inner //= length
            x, y = (i // inner) % length, (j // inner) % length
            group = x % dilation
            members = (length - group + dilation - 1) // dilation
            first, last = window_of(x // dilation, members, kernel, stride, causal)
            seen = seen & (y % dilation == group) & (y // dilation >= first) & (y // dilation <= last)
        return seen | (j >= total)

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds | None:
        if self.extra or self.shape is None or len(self.shape) == 1:
            return None
        # The first axis alone says which blocks can touch; inner axes then make every touched block partial.
        inner = math.prod(self.shape) // self.shape[0]
        reach = (self.axes[0][0] + self.axes[1][0]) * self.axes[2][0]
        near = (j0 // inner - i1 // inner < reach) & (i0 // inner - j1 // inner < reach)
        return near, torch.zeros_like(near)

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
