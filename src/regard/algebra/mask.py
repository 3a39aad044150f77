"""Masks: predicates over (batch, head, query, key) that combine with `&`, `|`, `~` and know their blocks.

i and j are absolute positions: j in [0, Lk), and i in [Lk - Lq, Lk), queries being aligned to the end of the keys.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .part import Function, Input, Part, Sizes, call, described

Bounds = tuple[Tensor, Tensor]


@described
class Mask(Part):
    """Which keys a query may see. `bounds` must never call a block empty that holds a visible pair, nor full one that hides one."""

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        """Broadcasting integer indices -> bool."""
        raise NotImplementedError

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds | None:
        """(some pair visible, every pair visible) for blocks i0..i1, j0..j1, both ends included; None: look at the pairs."""
        return None

    def bounds_of(self, inputs: Mapping[str, Tensor], i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds | None:
        """`bounds`, by a mask that finds them in its tensors: then of each batch and head too."""
        return self.bounds(i0, i1, j0, j1)

    def counts(self, inputs: Mapping[str, Tensor], i: Tensor, k_len: int) -> Tensor | None:
        """How many keys the queries at i (Lq,) see, (B or 1, H or 1, Lq), where that is known at once; None: count them."""
        return None

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        """Names and letters of `sides`."""
        return ()

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        """The mask's tensors in elementwise form, (B|1, H|1, Lq|1, Lk|1): what generated kernels load."""
        return {}

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        """`visible` of one pair, given the pair's entries of `sides`: what generated kernels print."""
        return self.visible(b, h, i, j, {})

    def in_sight(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """(B or 1, Lk or 1) bool: keys that some query may see, where a tensor of the mask says so; None: look at the pairs."""
        return None

    def arranged(self, sizes: Sizes) -> tuple[Mask, Tensor] | None:
        """The same mask for tokens in an order (Lk,) under which visible pairs lie in fewer blocks; None: the order is good."""
        return None

    @property
    def reads(self) -> bool:
        """Whether the mask reads tensors of the call."""
        return any(getattr(part, "inputs", ()) for part in self.parts())

    @property
    def relative(self) -> bool:
        """Whether only i - j decides, so that equal offsets share one answer."""
        return False

    def __and__(self, other: Mask) -> Mask:
        return self if isinstance(other, Full) else other if isinstance(self, Full) else Both(self, as_mask(other))

    def __or__(self, other: Mask) -> Mask:
        return Either(self, as_mask(other))

    def __invert__(self) -> Mask:
        return Without(self)

    @property
    def causal(self) -> bool:
        """Whether the predicate is known never to show a later key."""
        return False


def as_mask(mask: Mask | Function | None) -> Mask:
    """None is Full; a plain function of (b, h, i, j) becomes a mask."""
    if mask is None:
        return FULL
    if isinstance(mask, Mask):
        return mask
    if callable(mask):
        return Where(mask)
    if isinstance(mask, Tensor):
        raise RegardError(
            "a tensor stands alone as mask=tensor; to join it with other masks use regard.algebra.Explicit() in its place and pass "
            "visible=tensor, bool, of shape (B or 1, H or 1, Lq or 1, Lk or 1)"
        )
    raise RegardError(f"mask is {type(mask).__name__}; expected a regard mask, a function of (b, h, i, j), a bool tensor or None")


@described
class Pair(Mask):
    """Two masks and the tensors of both."""

    left: Mask
    right: Mask

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys((*self.left.side_shapes, *self.right.side_shapes)))

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        return {**self.left.sides(inputs, q_len, device), **self.right.sides(inputs, q_len, device)}

    @property
    def relative(self) -> bool:
        return self.left.relative and self.right.relative


@described
class Both(Pair):
    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return self.left.predicate(b, h, i, j, sides) & self.right.predicate(b, h, i, j, sides)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return self.left.visible(b, h, i, j, env) & self.right.visible(b, h, i, j, env)

    @property
    def causal(self) -> bool:
        return self.left.causal or self.right.causal


def conjuncts(mask: Mask) -> list[Mask]:
    """The masks that must all hold."""
    return [*conjuncts(mask.left), *conjuncts(mask.right)] if isinstance(mask, Both) else [mask]


@described
class Either(Pair):
    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return self.left.predicate(b, h, i, j, sides) | self.right.predicate(b, h, i, j, sides)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return self.left.visible(b, h, i, j, env) | self.right.visible(b, h, i, j, env)

    @property
    def causal(self) -> bool:
        return self.left.causal and self.right.causal


@described
class Without(Mask):
    mask: Mask

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return self.mask.side_shapes

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        return self.mask.sides(inputs, q_len, device)

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return ~self.mask.predicate(b, h, i, j, sides)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return ~self.mask.visible(b, h, i, j, env)


@described
class Full(Mask):
    """Every key."""

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return (i == i) & (j == j)

    def bounds(self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        every = (i0 == i0) & (j0 == j0)
        return every, every

    def counts(self, inputs: Mapping[str, Tensor], i: Tensor, k_len: int) -> Tensor:
        return torch.full_like(i, k_len)[None, None]

    def __and__(self, other: Mask) -> Mask:
        return as_mask(other)


FULL = Full()


@described
class PerHead(Mask):
    """Head h sees masks[h mod len(masks)]."""

    masks: tuple[Mask, ...]

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys(shape for mask in self.masks for shape in mask.side_shapes))

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        return {name: x for mask in self.masks for name, x in mask.sides(inputs, q_len, device).items()}

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        head = h % len(self.masks)
        each = [(head == number) & mask.predicate(b, h, i, j, sides) for number, mask in enumerate(self.masks)]
        return functools.reduce(lambda one, other: one | other, each)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        seen = self.masks[0].visible(b, h, i, j, env) & (h == h)
        for number, mask in enumerate(self.masks[1:], 1):
            seen = torch.where(h % len(self.masks) == number, mask.visible(b, h, i, j, env), seen)
        return seen

    @property
    def causal(self) -> bool:
        return all(mask.causal for mask in self.masks)


@described
class Where(Mask):
    """A user's predicate: `function(b, h, i, j, **declared inputs) -> bool tensor`; indices broadcast."""

    function: Function
    inputs: tuple[Input, ...] = ()

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        return call(self.function, b, h, i, j, env=env)


def spans(start: Tensor, stop: Tensor, last: int) -> Tensor:
    """The positions of each span start..stop, cut to 0..last; shorter spans repeat their last one."""
    width = int((stop - start).max()) + 1 if start.numel() else 1
    inside = torch.arange(width, device=start.device)
    return torch.minimum(start[..., None] + inside, stop[..., None]).clamp(0, last)


def positive(part: Part, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{type(part).__name__}({name}={value!r}): expected a positive integer")
