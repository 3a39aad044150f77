"""What can be tapped, and the part of it that a tap takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError, nearest

# In the order in which a block computes them.
POINTS = (
    "residual_in",
    "q_pre_rotary",
    "k_pre_rotary",
    "q",
    "k",
    "v",
    "logits",
    "weights",
    "heads",
    "out",
    "residual_mid",
    "mlp",
    "residual_out",
)
UNTURNED = ("q_pre_rotary", "k_pre_rotary")
KEYS = ("k_pre_rotary", "k", "v")  # of key heads
MAPS = ("logits", "weights")
STREAM = ("residual_in", "out", "residual_mid", "mlp", "residual_out")  # (B, L, dim), of no head

Edit = Callable[..., Tensor]


def check_points(points: Iterable[str]) -> list[str]:
    found = list(points)
    for name in found:
        if name not in POINTS:
            raise RegardError(f"point {name!r}; expected some of {', '.join(POINTS)}.{nearest(str(name), POINTS)}")
    if len(set(found)) < len(found):
        raise RegardError(f"points={found}; expected each point once")
    return found


@dataclass(frozen=True)
class At:
    """Where a tensor was taken, for edits that want to know. start: the place of the call's first token in its sequence (tokens in the
    cache before it). real (B, L) bool: which tokens of the call are no padding, or None."""

    layer: int
    point: str
    heads: tuple[int, ...] | None
    positions: tuple[int, ...] | None
    start: int
    real: Tensor | None


@dataclass(frozen=True)
class Places:
    """positions of a tap: places in the sequence; negative ones count from the end of the call. None: all."""

    positions: tuple[int, ...] | None

    def rows(self, length: int, start: int) -> list[int]:
        """The call's own numbers, 0 .. length - 1, of the positions that stand in it."""
        if self.positions is None:
            return list(range(length))
        found = []
        for place in self.positions:
            row = place + length if place < 0 else place - start
            if start == 0 and not 0 <= row < length:
                raise RegardError(f"positions holds {place}, and the call has {length} tokens; expected {-length} .. {length - 1}")
            if 0 <= row < length:
                found.append(row)
        return list(dict.fromkeys(found))


def take(x: Tensor, axes: dict[int, list[int]]) -> Tensor:
    """x at these numbers of these axes; itself where that is all of it."""
    for axis, at in axes.items():
        if at != list(range(x.shape[axis])):
            x = x.index_select(axis, torch.tensor(at, dtype=torch.long, device=x.device))
    return x


def put(x: Tensor, axes: dict[int, list[int]], new: Tensor) -> Tensor:
    """A copy of x that is `new` at these numbers of these axes."""
    if all(at == list(range(x.shape[axis])) for axis, at in axes.items()):
        return new
    index: list[Any] = [slice(None)] * (max(axes) + 1)
    for number, (axis, at) in enumerate(sorted(axes.items())):
        shape = [1] * len(axes)
        shape[number] = -1
        index[axis] = torch.tensor(at, dtype=torch.long, device=x.device).view(shape)
    out = x.clone()
    out[tuple(index)] = new.to(x.dtype)
    return out


def edited(function: Edit, x: Tensor, at: At) -> Tensor:
    """function(x), or function(x, at) where it takes two arguments; RegardError unless it gives a tensor of x's shape with numbers."""
    new = function(x, at) if takes_two(function) else function(x)
    where = f"the edit of {at.point!r} in layer {at.layer}"
    if not isinstance(new, Tensor) or new.shape != x.shape:
        came = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise RegardError(f"{where} gave {came}; expected a tensor of shape {tuple(x.shape)}")
    if new.dtype != x.dtype or new.device != x.device:
        raise RegardError(f"{where} gave {new.dtype} on {new.device}; expected {x.dtype} on {x.device}")
    if at.point == "logits":
        if bool((new.isnan() | new.isposinf()).any()):
            raise RegardError(f"{where} gave NaN or +inf; expected finite numbers, or -inf for keys that are not seen")
    elif new is not x and not bool(new.isfinite().all()):
        raise RegardError(f"{where} gave numbers that are not finite; expected finite ones")
    return new


def takes_two(function: Edit) -> bool:
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = [p for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(plain) >= 2
