"""Queries and keys before rotary positions: a module's forward in which its rotary function is looked at, and only this module's."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import RegardError

Through = Callable[[str, Tensor], Tensor]
ROTARY = re.compile(r"rotary|rope")


def rotary_names(kind: type) -> list[str]:
    """The functions by which the forward of an attention class of transformers turns queries and keys."""
    forward: Any = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    return [name for name in forward.__code__.co_names if ROTARY.search(name) and inspect.isfunction(forward.__globals__.get(name))]


def with_globals(function: Any, changes: dict[str, Any]) -> Any:
    """The function, and those that it wraps, with some of its module's names meaning something else; the module's own stay as they are."""
    inner = getattr(function, "__wrapped__", None)
    space, cells = {**function.__globals__, **changes}, function.__closure__
    if inner is not None:
        changed = with_globals(inner, changes)
        space = function.__globals__
        cells = tuple(types.CellType(changed) if cell.cell_contents is inner else cell for cell in cells or ())
    made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class Turning:
    """A module whose rotary function shows what it takes: q (B, H, L, D) and k (B, Hkv, L, D) of a call's new tokens pass `through` as
    "q_pre_rotary" and "k_pre_rotary" before they are turned. `remove()` ends it."""

    def __init__(self, module: nn.Module, heads: int, kv_heads: int, through: Through):
        if "forward" in vars(module):
            raise RegardError(
                f"{type(module).__name__} has a forward of its own (of accelerate, or a patch), in which rotary positions are not seen; expected "
                "other points than q_pre_rotary and k_pre_rotary"
            )
        self.module, self.heads, self.through = module, (heads, kv_heads), through
        self.seen: set[str] = set()
        own = type(module).forward
        known: dict[str, Any] = inspect.unwrap(own).__globals__  # type: ignore[attr-defined]
        changed = with_globals(own, {name: self.looked(known[name]) for name in rotary_names(type(module))})

        @functools.wraps(own)
        def forward(this: nn.Module, *args: Any, **options: Any) -> Any:
            if this is not module:  # a copy of the module
                return own(this, *args, **options)
            self.seen.clear()
            out = changed(this, *args, **options)
            if self.seen != {"q_pre_rotary", "k_pre_rotary"}:
                raise RegardError(
                    f"{type(module).__name__} turned no queries and keys of its heads in this call; expected the points q_pre_rotary and "
                    "k_pre_rotary of layers that have rotary positions (layers=[...]), or the points q and k"
                )
            return out

        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]

    def remove(self) -> None:
        del self.module.forward

    def looked(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The rotary function, of q and k at once or one after the other."""
        axis_named = inspect.signature(own).parameters.get("unsqueeze_dim")

        @functools.wraps(own)
        def turn(*args: Any, **options: Any) -> Any:
            axis = options.get("unsqueeze_dim", None if axis_named is None else axis_named.default)
            first = next((name for name in ("q", "query", "x", "xq") if name in options), None)
            if first is not None and not args:
                args = (options.pop(first),)
            if self.is_heads(args[0], axis, 0) and len(args) > 1 and self.is_heads(args[1], axis, 1):
                args = (self.passed("q_pre_rotary", args[0], axis, 0), self.passed("k_pre_rotary", args[1], axis, 1), *args[2:])
            elif self.heads[0] != self.heads[1]:
                for number, point in enumerate(("q_pre_rotary", "k_pre_rotary")):
                    if self.is_heads(args[0], axis, number):
                        args = (self.passed(point, args[0], axis, number), *args[1:])
                        break
            return own(*args, **options)

        return turn

    def axis_of(self, x: Tensor, axis: Any, number: int) -> int:
        """Where the heads stand: 1, or 2 in functions that take tokens first."""
        if axis in (1, 2):
            return int(axis)
        return 1 if x.shape[1] == self.heads[number] and (x.shape[2] != x.shape[1] or x.stride(1) < x.stride(2)) else 2

    def is_heads(self, x: Any, axis: Any, number: int) -> bool:
        return isinstance(x, Tensor) and x.dim() == 4 and x.shape[self.axis_of(x, axis, number)] == self.heads[number]

    def passed(self, point: str, x: Tensor, axis: Any, number: int) -> Tensor:
        self.seen.add(point)
        if self.axis_of(x, axis, number) == 1:
            return self.through(point, x)
        new = self.through(point, x.transpose(1, 2))
        return new.transpose(1, 2)
