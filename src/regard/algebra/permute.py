"""An order of tokens: apply it, undo it. Every method that reorders tokens before cutting them into blocks uses this one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError


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
    if order.dim() == 1:
        return x.index_select(-2, order)
    place = order[..., None].expand(*x.shape[:-2], order.shape[-1], x.shape[-1])
    return x.gather(-2, place)


def tiles(shape: tuple[int, ...], tile: tuple[int, ...], extra: int = 0) -> Permutation:
    """Row-major tokens of a grid so that each tile's are consecutive; `extra` tokens after the grid stay where they are."""
    if len(shape) != len(tile) or any(t < 1 or length % t for length, t in zip(shape, tile, strict=False)):
        raise RegardError(f"tile={tile} on a grid of shape={shape}: expected one divisor an axis")
    axes = len(shape)
    split = [size for length, t in zip(shape, tile, strict=True) for size in (length // t, t)]
    grid = torch.arange(math.prod(shape)).reshape(split)
    order = grid.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)).flatten()
    return Permutation(torch.cat((order, torch.arange(len(order), len(order) + extra))))


def by_value(values: Tensor, segment: int) -> Permutation:
    """Tokens by falling `values` (..., L) inside each complete segment of `segment` tokens; the rest stays where it is."""
    whole = values.shape[-1] // segment * segment
    place = torch.arange(values.shape[-1], device=values.device).expand(values.shape).clone()
    inside = values[..., :whole].unflatten(-1, (-1, segment)).sort(dim=-1, descending=True, stable=True).indices
    starts = torch.arange(0, whole, segment, device=values.device)
    place[..., :whole] = (inside + starts[:, None]).flatten(-2)
    return Permutation(place)
