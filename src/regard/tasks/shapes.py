"""Images of one shape, filled with one texture, on another: which shape and which texture are answers that do not depend on one another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RegardError

SHAPES = ("square", "disc", "cross", "ring")
TEXTURES = ("horizontal", "vertical", "rising", "falling")


class Textured(NamedTuple):
    """images (B, 3, side, side), shape and texture (B,): numbers in SHAPES and TEXTURES, ink (B, side, side) bool: where the shape is."""

    images: Tensor
    shape: Tensor
    texture: Tensor
    ink: Tensor


def stripes(texture: Tensor, generator: torch.Generator, side: int, period: float) -> Tensor:
    """Waves of deviation 1 along the direction of each texture, at any phase: (B, side, side)."""
    angle = torch.tensor([90.0, 0.0, 45.0, 135.0])[texture].deg2rad()[:, None, None]
    axis = torch.arange(side, dtype=torch.float32)
    phase = torch.rand(len(texture), 1, 1, generator=generator)
    along = (axis * angle.cos() + axis[:, None] * angle.sin()) / period
    return 2**0.5 * torch.sin(2 * torch.pi * (along + phase))


def textured_shapes(
    count: int, generator: torch.Generator, side: int = 16, period: float = 4.0, noise: float = 0.3, cover: tuple[float, float] = (0.5, 0.8)
) -> Textured:
    """A shape of `cover` of the side, anywhere it fits, filled with stripes of one direction, on stripes of another. Every pixel has the same mean and
    deviation, so that neither answer is in what a pixel is; the colours are alike."""
    if side < 8 or not 0 < cover[0] <= cover[1] <= 1 or period < 2:
        raise RegardError(f"side={side}, cover={cover}, period={period}; expected at least 8, shares in (0, 1], at least 2")
    shape, texture, other = (torch.randint(n, (count,), generator=generator) for n in (len(SHAPES), len(TEXTURES), len(TEXTURES) - 1))
    size = side * (cover[0] + (cover[1] - cover[0]) * torch.rand(count, 1, 1, generator=generator))
    corner = (side - size[..., None]) * torch.rand(count, 2, 1, 1, generator=generator)
    axis = torch.arange(side) + 0.5
    down = ((axis[:, None] - corner[:, 0]) / size * 2 - 1).abs().expand(-1, side, side)
    across = ((axis - corner[:, 1]) / size * 2 - 1).abs().expand(-1, side, side)
    far, box = (down.square() + across.square()).sqrt(), torch.maximum(down, across)
    drawn = torch.stack((box <= 0.9, far <= 1, (box <= 1) & (torch.minimum(down, across) <= 0.35), (far <= 1) & (far >= 0.55)), 1)
    ink = drawn[torch.arange(count), shape]
    inside = stripes(texture, generator, side, period)
    outside = stripes((texture + 1 + other) % len(TEXTURES), generator, side, period)
    x = torch.where(ink, inside, outside)[:, None].expand(-1, 3, -1, -1)
    return Textured(x + noise * torch.randn(x.shape, generator=generator), shape, texture, ink)
