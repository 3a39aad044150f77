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


def multiple_between(low: Tensor, high: Tensor, step: int) -> Tensor:
    """Whether [low, high] holds a multiple of `step`."""
    return torch.div(high, step, rounding_mode="floor") * step >= low


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
