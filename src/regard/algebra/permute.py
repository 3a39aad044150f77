"""An order of tokens: apply it, undo it. Every method that reorders tokens before cutting them into blocks uses this one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError
from .snapshot import remembered


@dataclass(frozen=True, eq=False)
class Permutation:
    """order (..., L): new place n holds old token order[n]; leading dimensions broadcast to those of what is permuted."""

    order: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x (..., L, D) in the new order."""
        return taken(x, self.order)

    def invert(self, x: Tensor) -> Tensor:
        """x (..., L, D) of the new order, back in the old one."""
        return taken(x, self.order.argsort(-1))


def taken(x: Tensor, order: Tensor) -> Tensor:
    """x (..., L, D) at places `order` (..., L'), whose leading dimensions broadcast to those of x; whole rows at a time."""
    lead, (length, width) = x.shape[:-2], x.shape[-2:]
    heads = torch.arange(math.prod(lead), device=x.device).view(*lead, 1) * length
    return x.reshape(-1, width).index_select(0, (heads + order).flatten()).view(*lead, order.shape[-1], width)


def tiles(shape: tuple[int, ...], tile: tuple[int, ...], extra: int = 0) -> Permutation:
    """Row-major tokens of a grid so that each tile's are consecutive; `extra` tokens after the grid stay where they are."""
    if len(shape) != len(tile) or any(t < 1 or length % t for length, t in zip(shape, tile, strict=False)):
        raise RegardError(f"tile={tile} on a grid of shape={shape}: expected one divisor an axis")
    return Permutation(grid_order(shape, tile, (1,) * len(shape), extra))


@remembered(maxsize=64)
def grid_order(shape: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...], extra: int = 0) -> Tensor:
    """Row-major places of a grid's tokens, one dilation group after the other, tile by tile in it; border tiles may be smaller."""
    place, inner = torch.arange(math.prod(shape)), math.prod(shape)
    if not inner:
        return torch.arange(extra)
    digits: list[list[tuple[Tensor, int]]] = [[], [], []]  # of a mixed-radix number: groups, tiles, places inside
    for length, t, d in zip(shape, tile, dilation, strict=True):
        inner //= length
        x = (place // inner) % length
        members = -(-length // d)
        for digit, radix, into in zip((x % d, x // d // t, x // d % t), (d, -(-members // t), t), digits, strict=True):
            into.append((digit, radix))
    number = torch.zeros_like(place)
    for digit, radix in (*digits[0], *digits[1], *digits[2]):
        number = number * radix + digit
    return torch.cat((number.argsort(), torch.arange(len(place), len(place) + extra)))


def by_value(values: Tensor, segment: int) -> Permutation:
    """Tokens by falling `values` (..., L) inside each complete segment of `segment` tokens; the rest stays where it is."""
    whole = values.shape[-1] // segment * segment
    place = torch.arange(values.shape[-1], device=values.device).expand(values.shape).clone()
    inside = values[..., :whole].unflatten(-1, (-1, segment)).sort(dim=-1, descending=True, stable=True).indices
    starts = torch.arange(0, whole, segment, device=values.device)
    place[..., :whole] = (inside + starts[:, None]).flatten(-2)
    return Permutation(place)
