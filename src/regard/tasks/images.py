"""Generated images whose labels are exact, each batch drawn from a generator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError

Batch = tuple[Tensor, Tensor]


def bumps(centres: Tensor, side: int, spread: float) -> Tensor:
    """Gaussians of height 1 at centres (..., 2), rows and columns in pixels: (..., side, side)."""
    axis = torch.arange(side, dtype=centres.dtype)
    square = (centres[..., 0, None, None] - axis[:, None]).square() + (centres[..., 1, None, None] - axis).square()
    return torch.exp(-square / (2 * spread**2))


def distant_signs(count: int, generator: torch.Generator, side: int = 16, noise: float = 0.1) -> Batch:
    """Whether two bumps far apart have the same sign: one in channel 0 on the left, one in channel 1 on the right; images (count, 2, side,
    side), labels 0 or 1. A net that adds up what it finds in fields smaller than side / 2 is right at most three times in four."""
    x = noise * torch.randn(count, 2, side, side, generator=generator)
    sign = 2 * torch.randint(2, (count, 2), generator=generator) - 1
    at = 2 + (side - 5) * torch.rand(count, 2, 2, generator=generator)
    at[:, :, 1] = at[:, :, 1] / (side - 1) * (side / 4 - 1) + torch.tensor([1.0, 3 * side / 4])
    x += sign[..., None, None] * bumps(at, side, 1.0)
    return x, (sign.prod(-1) > 0).long()


def cued_bumps(count: int, generator: torch.Generator, side: int = 16, noise: float = 0.1) -> Batch:
    """Where the bump is that has the sign of a cue far away: channel 0 has a bright and a dark bump on the left, channel 1 a bump on the right
    that is the cue; images (count, 2, side, side), targets (count, 1, side, side), a Gaussian of height 1."""
    x = noise * torch.randn(count, 2, side, side, generator=generator)
    at = 2 + (side - 5) * torch.rand(count, 3, 2, generator=generator)
    at[:, :, 1] = at[:, :, 1] / (side - 1) * (side / 4 - 1) + torch.tensor([1.0, 1.0, 3 * side / 4])
    at[:, :2, 0] = at[:, :2, 0] / 2 + torch.tensor([0.0, side / 2 - 1])  # one in the upper half, one in the lower
    swap = torch.randint(2, (count,), generator=generator)
    bright = torch.where(swap[:, None] == 1, at[:, 0], at[:, 1])
    dark = torch.where(swap[:, None] == 1, at[:, 1], at[:, 0])
    sign = 2 * torch.randint(2, (count,), generator=generator) - 1
    x[:, 0] += bumps(bright, side, 1.0) - bumps(dark, side, 1.0)
    x[:, 1] += sign[:, None, None] * bumps(at[:, 2], side, 1.0)
    return x, bumps(torch.where(sign[:, None] > 0, bright, dark), side, 1.0)[:, None]


def named_squares(
    count: int, generator: torch.Generator, side: int = 32, size: int = 8, noise: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """One red, one green and one blue square that do not overlap, and one of them named: images (count, 3, side, side), the colour named
    (count,), and the masks of all three squares (count, 3, side, side) bool."""
    cells = side // size
    if cells**2 < 3:
        raise RegardError(f"side={side}, size={size}: room for {cells**2} squares; expected three")
    at = torch.rand(count, cells**2, generator=generator).argsort(1)[:, :3]
    axis = torch.arange(side) // size
    masks = (axis[:, None] * cells + axis)[None, None] == at[:, :, None, None]
    masks &= bool(side % size == 0) | ((axis[:, None] < cells) & (axis < cells))
    x = masks.float() + noise * torch.randn(count, 3, side, side, generator=generator)
    return x, torch.randint(3, (count,), generator=generator), masks


def listed_glyphs(
    count: int, generator: torch.Generator, grid: int = 4, glyphs: int = 3, kinds: int = 6, size: int = 4, noise: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """A few different glyphs in cells of a grid, and their list row by row: images (count, 1, grid size, grid size), words (count, glyphs) from 1 to
    kinds, and the cells they stand in (count, glyphs), numbered row by row. A kind's strokes, of -1 and 1, are the same in every batch."""
    if glyphs > min(kinds, grid**2):
        raise RegardError(f"glyphs={glyphs}; expected at most {min(kinds, grid**2)}, the kinds and the cells")
    strokes = 2.0 * torch.randint(2, (kinds, size, size), generator=torch.Generator().manual_seed(kinds)) - 1
    cells = torch.rand(count, grid**2, generator=generator).argsort(1)[:, :glyphs].sort(1).values
    words = torch.rand(count, kinds, generator=generator).argsort(1)[:, :glyphs]
    x = torch.zeros(count, grid**2, size, size)
    x.scatter_(1, cells[..., None, None].expand(-1, -1, size, size), strokes[words])
    x = x.unflatten(1, (grid, grid)).transpose(2, 3).reshape(count, 1, grid * size, grid * size)
    return x + noise * torch.randn(x.shape, generator=generator), words + 1, cells


def coloured_glyphs(
    count: int, generator: torch.Generator, share: float = 0.95, kinds: int = 4, side: int = 16, size: int = 8, noise: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """A grey glyph somewhere, on steps of two pixels, on a colour: images (count, 3, side, side), the glyph's kind (count,), and where it stands (count,
    side, side) bool. In `share` of the images the colour is the kind's own, in the others any kind's: a shortcut, which share=0 takes away. A kind's
    strokes, of -1 and 1 in 2 x 2 pixels, and colour are the same in every batch."""
    if kinds < 2 or size % 2 or side % 2 or not 2 <= size <= side - 4 or not 0 <= share <= 1:
        raise RegardError(
            f"kinds={kinds}, size={size}, side={side}, share={share}; expected at least 2, even sizes, a glyph smaller than the image by 4, a share"
        )
    fixed = torch.Generator().manual_seed(kinds)
    cells = 2.0 * torch.randint(2, (kinds, size // 2, size // 2), generator=fixed) - 1
    strokes = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)
    colours = torch.randn(kinds, 3, generator=fixed)
    colours = (colours - colours.mean(1, keepdim=True)) / colours.std(1, correction=0, keepdim=True)
    label, other = torch.randint(kinds, (2, count), generator=generator)
    behind = torch.where(torch.rand(count, generator=generator) < share, label, other)
    at = 2 * torch.randint(1, (side - size) // 2, (count, 2), generator=generator)
    axis = torch.arange(side) - at[..., None]
    inside = (axis >= 0) & (axis < size)
    ink = inside[:, 0, :, None] & inside[:, 1, None]
    row, column = axis.clamp(0, size - 1).unbind(1)
    grey = strokes[label[:, None, None], row[:, :, None], column[:, None]]
    x = torch.where(ink[:, None], grey[:, None], colours[behind][..., None, None])
    return x + noise * torch.randn(x.shape, generator=generator), label, ink


def scenes(
    count: int, generator: torch.Generator, side: int = 32, most: int = 2, noise: float = 0.1
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One to `most` squares and discs of any colour and size, no two in the same quarter: images (count, 3, side, side), their boxes (count, most, 4),
    left, top, right and bottom in pixels, and kinds (count, most), 0 for squares, 1 for discs, -1 where there is none, whose box is zeros."""
    if not 1 <= most <= 4 or side < 8:
        raise RegardError(f"most={most}, side={side}; expected 1 to 4 and at least 8 pixels")
    half = side // 2
    cells = torch.rand(count, 4, generator=generator).argsort(1)[:, :most]
    size = half / 2 + (half / 2) * torch.rand(count, most, generator=generator)
    corner = torch.stack((cells % 2, cells // 2), -1) * half + (half - size)[..., None] * torch.rand(count, most, 2, generator=generator)
    kinds = torch.randint(2, (count, most), generator=generator)
    there = torch.arange(most) < torch.randint(1, most + 1, (count, 1), generator=generator)
    colours = 0.5 + torch.rand(count, most, 3, generator=generator)
    colours = colours * (2 * torch.randint(2, (count, most, 1), generator=generator) - 1)
    axis = torch.arange(side) + 0.5
    off = [(axis - corner[..., at, None] - size[..., None] / 2).abs() / (size[..., None] / 2) for at in (0, 1)]  # 1 at the sides of the box
    across, down = off[0][:, :, None], off[1][..., None]
    ink = (
        torch.where(kinds[..., None, None] == 1, across.square() + down.square() <= 1, torch.maximum(across, down) <= 1)
        & there[..., None, None]
    )
    x = torch.einsum("nmhw,nmc->nchw", ink.float(), colours) + noise * torch.randn(count, 3, side, side, generator=generator)
    boxes = torch.cat((corner, corner + size[..., None]), -1)
    return x, (boxes * there[..., None], kinds.masked_fill(~there, -1))
