"""Positions: what a pair's place adds to its score, by turning q and k (rotary) or by changing the score."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .part import Function, Input, Learned, Part, Sizes, asks, bind, call, described, show


@described
class Position(Part):
    """`rotate` acts on q or k at absolute positions; `modify`, a plain function of s and of any of (b, h, i, j, n, inputs),
    acts on scores. Queries are aligned to the end of the keys."""

    @property
    def modify(self) -> Function | None:
        return None

    @property
    def relative(self) -> bool:
        """Whether only i - j matters, so that a stream may forget keys and count from the first it still has."""
        return True

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


@described
class Modified(Position):
    """A user's own: `function(s, ...)` with any of b, h, i, j, n and the declared inputs by name."""

    function: Function
    inputs: tuple[Input, ...] = ()

    @property
    def modify(self) -> Function:
        return self.function

    @property
    def relative(self) -> bool:
        return not {"i", "j", "n"} & set(asks(self.function, 1))


@described
class InTurn:
    """Several plain functions of scores, one after another; asks by name for what any of them asks for."""

    functions: tuple[Function, ...]

    @property
    def __signature__(self) -> inspect.Signature:
        names = dict.fromkeys(name for function in self.functions for name in asks(function, 1))
        kinds = [inspect.Parameter("s", inspect.Parameter.POSITIONAL_ONLY)]
        return inspect.Signature(kinds + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names])

    def __call__(self, s: Any, /, **named: Any) -> Any:
        for function in self.functions:
            s = function(s, **{name: named[name] for name in asks(function, 1)})
        return s

    def __repr__(self) -> str:
        return f"regard.algebra.position.InTurn({show(self.functions)})"


@described
class Chain(Position):
    """Several positions, one after another: each turns q and k, and changes the scores that those before it give."""

    positions: tuple[Position, ...] = ()

    @property
    def modify(self) -> Function | None:
        found = tuple(position.modify for position in self.positions if position.modify is not None)
        return InTurn(found) if len(found) > 1 else found[0] if found else None

    @property
    def relative(self) -> bool:
        return all(position.relative for position in self.positions)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        for position in self.positions:
            x = position.rotate(x, positions)
        return x


@described
class Rope(Position):
    """Rotary embedding: channel pairs turned by position * base^(-2c/dims); `interleaved` pairs (0,1),(2,3).. instead of halves.

    dims: how many leading channels turn (None: all). Positions are (n,), or have leading dimensions that broadcast to those of x.
    RoFormer (Su et al., 2021).
    """

    base: float = 10000.0
    dims: int | None = None
    interleaved: bool = False

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        dims = x.shape[-1] if self.dims is None else self.dims
        if dims % 2 or not 0 < dims <= x.shape[-1]:
            raise RegardError(
                f"head_dim={x.shape[-1]}, dims={dims}: rotary positions turn pairs of channels; expected an even number of at most head_dim"
            )
        rates = self.base ** (-torch.arange(0, dims, 2, device=x.device, dtype=torch.float64) / dims)
        angle = positions.to(torch.float64)[..., None] * rates
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        turned, rest = x[..., :dims].to(wide), x[..., dims:]
        if self.interleaved:
            a, c = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack((a * cos - c * sin, a * sin + c * cos), -1).flatten(-2)
        else:
            a, c = turned.chunk(2, -1)
            out = torch.cat((a * cos - c * sin, a * sin + c * cos), -1)
        return torch.cat((out.to(x.dtype), rest), -1)


def grid_rotary(x: Tensor, position: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Two-dimensional rotary of tokens on a grid `width` wide, in row order: neighbouring channels turn in pairs, the first half of the
    channels by row * base^-t and the rest by column * base^-t, t from 0 to 1 in D/4 steps (channels must divide by 4)."""
    d = x.shape[-1]
    if d % 4:
        raise RegardError(f"head_dim={d}: a rotary embedding of two dimensions turns pairs of channels; expected a multiple of 4")
    rates = base ** -torch.linspace(0, 1, d // 4, dtype=torch.float64, device=x.device)
    angle = torch.cat([at.to(torch.float64)[:, None] * rates for at in (position // width, position % width)], -1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, c = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - c * sin, a * sin + c * cos), -1).flatten(-2)


def alibi_slopes(sizes: Sizes) -> Tensor:
    """ALiBi's geometric slopes 2^(-8h/H), with the paper's interpolation when H is not a power of two."""

    def powers(count: int) -> list[float]:
        return [2 ** (-8 * (head + 1) / count) for head in range(count)]

    below = 2 ** math.floor(math.log2(sizes.heads))
    return torch.tensor(powers(below) + powers(2 * below)[0::2][: sizes.heads - below], dtype=torch.float64)


def alibi(s: Tensor, i: Tensor, j: Tensor, slopes: Tensor) -> Tensor:
    return s - slopes * (i - j).abs()


@described
class Alibi(Position):
    """s_ij - slope_h * |i - j|; input `slopes` (H,), by default the paper's geometric ones (Press et al., 2021)."""

    inputs: tuple[Input, ...] = (Input("slopes", "h", default=alibi_slopes, layer=Learned(alibi_slopes, trainable=False)),)

    @property
    def modify(self) -> Function:
        return alibi


def harmonic_number(n: Any) -> Any:
    """H_n = 1 + 1/2 + ... + 1/n of n >= 0, elementwise: Euler and Maclaurin's series from n + 8 on, to 1e-12, and eight terms back."""
    r = 1 / (n + 8)
    u = r * r
    tail = u * (1 / 12 - u * (1 / 120 - u * (1 / 252 - u * (1 / 240 - u / 132))))
    back = 1 / (n + 1) + 1 / (n + 2) + 1 / (n + 3) + 1 / (n + 4) + 1 / (n + 5) + 1 / (n + 6) + 1 / (n + 7) + r
    return 0.5772156649015329 - torch.log(r) + r / 2 - tail - back


def harmonic_added(s: Tensor, i: Tensor, j: Tensor, slopes: Tensor) -> Tensor:
    return s - slopes * harmonic_number((i - j).abs().type_as(s))


def harmonic_scaled(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s / (1 + (i - j).abs())


@described
class Harmonic(Position):
    """A distance penalty of the harmonic series (Li, 2024). way "additive": s_ij - slope_h * (1 + 1/2 + ... + 1/|i - j|), input `slopes` (H,),
    by default ALiBi's; "multiplicative": s_ij / (1 + |i - j|)."""

    way: str = "additive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.way not in ("additive", "multiplicative"):
            raise RegardError(f"Harmonic(way={self.way!r}): expected 'additive' or 'multiplicative'")

    @property
    def inputs(self) -> tuple[Input, ...]:
        return Alibi().inputs if self.way == "additive" else ()

    @property
    def modify(self) -> Function:
        return harmonic_added if self.way == "additive" else harmonic_scaled


def softcapped(s: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(s / cap)


@described
class Softcap(Position):
    """cap * tanh(s_ij / cap): no score leaves (-cap, cap) (Gemma 2; Riviere et al., 2024)."""

    cap: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cap > 0:
            raise RegardError(f"Softcap(cap={self.cap!r}): expected a positive number")

    @property
    def modify(self) -> Function:
        return bind(softcapped, cap=self.cap)


def biased(s: Tensor, position_bias: Tensor) -> Tensor:
    return s + position_bias


@described
class Bias(Position):
    """s_ij + bias_ij: any float tensor as a position, such as a model's own. Input `position_bias` (B, H, Lq, Lk), where 1 broadcasts."""

    inputs: tuple[Input, ...] = (Input("position_bias", "bhqk"),)

    @property
    def modify(self) -> Function:
        return biased

    @property
    def relative(self) -> bool:
        return False


def relative(s: Tensor, h: Tensor, i: Tensor, j: Tensor, table: Tensor, reach: int) -> Tensor:
    return s + table[h, (i - j).clamp(-reach, reach) + reach]


@described
class RelativeBias(Position):
    """s_ij + table[h, clip(i - j, -reach, reach) + reach]; input `table` (H, 2 reach + 1)."""

    reach: int = 128

    @property
    def modify(self) -> Function:
        return bind(relative, reach=self.reach)

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (Input("table", "hf", layer=Learned(bind(relative_init, reach=self.reach))),)


def relative_init(sizes: Sizes, reach: int) -> Tensor:
    return torch.zeros(sizes.heads, 2 * reach + 1)


def modify(position: Position | None, s: Tensor, env: Mapping[str, Any]) -> Tensor:
    """Scores after position."""
    return s if position is None or position.modify is None else call(position.modify, s, env=env)
