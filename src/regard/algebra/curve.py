"""A curve through every cell of a rectangle or box, from neighbour to neighbour: Hilbert's, of any size (Cerveny's generalisation)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import RegardError
from .permute import Permutation

Vector = tuple[int, int, int]


def plus(*vectors: Vector) -> Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))  # type: ignore[return-value]


def minus(x: Vector, y: Vector) -> Vector:
    return tuple(a - b for a, b in zip(x, y, strict=True))  # type: ignore[return-value]


def back(x: Vector) -> Vector:
    return tuple(-a for a in x)  # type: ignore[return-value]


def unit(x: Vector) -> Vector:
    return tuple((a > 0) - (a < 0) for a in x)  # type: ignore[return-value]


def half(x: Vector) -> Vector:
    """About half of an axis, an even number of steps where it can be."""
    steps = abs(sum(x)) // 2
    steps += steps % 2 and abs(sum(x)) > 2
    return tuple(a * steps for a in unit(x))  # type: ignore[return-value]


def walk(at: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Cells of the box with the axes a (along which the curve goes in the end), b and c from its corner `at`."""
    w, h, d = (abs(sum(x)) for x in (a, b, c))
    for axis, others in ((a, (h, d)), (b, (w, d)), (c, (w, h))):
        if others == (1, 1):
            for _ in range(abs(sum(axis))):
                yield at
                at = plus(at, unit(axis))
            return
    a2, b2, c2 = half(a), half(b), half(c)
    last_a, last_b, last_c = minus(a, unit(a)), minus(b2, unit(b)), minus(c, unit(c))
    rest_a, rest_b = minus(a, a2), minus(b, b2)
    if 2 * w > 3 * h and 2 * w > 3 * d:
        parts = [(at, a2, b, c), (plus(at, a2), rest_a, b, c)]
    elif 3 * h > 4 * d:
        parts = [(at, b2, c, a2), (plus(at, b2), a, rest_b, c), (plus(at, last_a, last_b), back(b2), c, back(rest_a))]
    elif 3 * d > 4 * h:
        turn = plus(at, last_a, minus(c2, unit(c)))
        parts = [(at, c2, a2, b), (plus(at, c2), a, b, minus(c, c2)), (turn, back(c2), back(rest_a), b)]
    else:
        parts = [
            (at, b2, c2, a2),
            (plus(at, b2), c, a2, rest_b),
            (plus(at, last_b, last_c), a, back(b2), back(minus(c, c2))),
            (plus(at, last_a, b2, last_c), back(c), back(rest_a), rest_b),
            (plus(at, last_a, last_b), back(b2), c2, back(rest_a)),
        ]
    for corner, *axes in parts:
        yield from walk(corner, *axes)


def gilbert(shape: tuple[int, ...], extra: int = 0) -> Permutation:
    """Row-major tokens of a grid (H, W) or (T, H, W) along the curve; `extra` tokens after the grid stay where they are. Cells that follow one another are
    neighbours, but for single steps where sizes are odd."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise RegardError(f"shape={shape}; expected (H, W) or (T, H, W)")
    sizes = (1, *shape) if len(shape) == 2 else shape
    axes: list[Vector] = [(sizes[0], 0, 0), (0, sizes[1], 0), (0, 0, sizes[2])]
    longest = sorted(axes, key=lambda x: -sum(x))
    cells = torch.tensor(list(walk((0, 0, 0), *longest)))
    order = (cells[:, 0] * sizes[1] + cells[:, 1]) * sizes[2] + cells[:, 2]
    return Permutation(torch.cat((order, torch.arange(len(order), len(order) + extra))))
