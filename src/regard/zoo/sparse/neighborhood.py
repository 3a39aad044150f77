"""Generalized neighbourhood attention on 1-D, 2-D and 3-D grids (id 157; Hassani et al., 2025).

each token attends to a window of `kernel` tokens an axis; queries of a stride group share their leader's window
stride 1: neighbourhood attention; stride = kernel: blocked attention
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from regard.algebra import Neighborhood, Weighted
from regard.algebra.neighborhood import window_of
from regard.catalog.registry import register
from regard.errors import RegardError

Axes = int | tuple[int, ...]


@register("neighborhood")
def neighborhood(
    shape: tuple[int, ...] | None = None,
    kernel: Axes = 13,
    stride: Axes = 1,
    dilation: Axes = 1,
    causal: bool | tuple[bool, ...] = False,
    extra: int = 0,
) -> Weighted:
    """shape: the grid, row-major in the sequence (None: a line). kernel, stride, dilation, causal: one value, or one an axis.
    extra: keys after the grid's, visible to all (the queries are the grid's tokens)."""
    return Weighted(mask=Neighborhood(shape, kernel, stride, dilation, causal, extra))


@dataclass(frozen=True)
class Simulation:
    """Tiles a kernel would visit. flop_speedup: tokens over window tokens; tile_speedup: all tile pairs over visited ones.
    perfect: no visited tile needs a mask, so both agree."""

    visited: int
    total: int
    flop_speedup: float
    tile_speedup: float
    perfect: bool


def simulate(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    q_tile: tuple[int, ...],
    kv_tile: tuple[int, ...],
    causal: bool = False,
) -> Simulation:
    """Count, from per-axis windows alone, the (query tile, key tile) pairs that hold a visible pair (dilation 1)."""
    if len({len(one) for one in (shape, kernel, stride, q_tile, kv_tile)}) > 1:
        raise RegardError(f"{shape=}, {kernel=}, {stride=}, {q_tile=}, {kv_tile=}; expected a number an axis in each")
    pairs, partial = [], []
    for length, k, s, tq, tk in zip(shape, kernel, stride, q_tile, kv_tile, strict=True):
        x = torch.arange(length)
        first, last = window_of(x, torch.tensor(length), k, s, causal)
        seen = (x >= first[:, None]) & (x <= last[:, None])
        padded = torch.nn.functional.pad(seen, (0, -length % tk, 0, -length % tq))
        tiles = padded.unflatten(0, (-1, tq)).unflatten(-1, (-1, tk))
        real = (
            torch.nn.functional.pad(torch.ones_like(seen), (0, -length % tk, 0, -length % tq))
            .unflatten(0, (-1, tq))
            .unflatten(-1, (-1, tk))
        )
        some = tiles.any(1).any(-1)
        whole = (tiles | ~real).all(1).all(-1)
        pairs.append(some)
        partial.append(bool((some & ~whole).any()))
    visited = math.prod(int(some.sum()) for some in pairs)
    total = math.prod(some.numel() for some in pairs)
    flop = math.prod(shape) / math.prod(kernel)
    return Simulation(visited, total, flop, total / visited, not any(partial))


def perfect_settings(
    shape: tuple[int, ...], q_tile: tuple[int, ...], kv_tile: tuple[int, ...], kernel: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Every stride for which the kernel visits no masked tile on this grid with these tiles."""
    strides = itertools.product(*[range(1, k + 1) for k in kernel])
    return [stride for stride in strides if simulate(shape, kernel, stride, q_tile, kv_tile).perfect]
