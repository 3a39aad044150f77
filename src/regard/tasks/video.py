"""Videos of handwritten digits that move, each along its own line, and come back from the borders."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError
from .digits import standard, written


class Moving(NamedTuple):
    """frames (B, T, 1, side, side); labels (B, digits): what moves; places (B, T, digits, 2): rows and columns of the digits' corners, in pixels;
    heading (B, digits): where it sets off, 0 right, 1 down, 2 left, 3 up."""

    frames: Tensor
    labels: Tensor
    places: Tensor
    heading: Tensor


def bounced(way: Tensor, room: float) -> Tensor:
    """Where on [0, room] what runs `way` from 0 is, when it turns at both ends."""
    return room - (way.remainder(2 * room) - room).abs() if room else torch.zeros_like(way)


def moving_digits(
    count: int,
    generator: torch.Generator,
    frames: int = 8,
    side: int = 20,
    digits: int = 1,
    speed: tuple[float, float] = (1.0, 2.0),
    held_out: bool = False,
) -> Moving:
    """scikit-learn's digits of 8 x 8 pixels, as many as `digits`, over one another by the larger ink, at `speed` pixels a frame in any direction.
    held_out: digits that no other call draws. MissingDependency: without scikit-learn."""
    if side < 8 or frames < 1 or digits < 1 or not 0 <= speed[0] <= speed[1]:
        raise RegardError(f"side={side}, frames={frames}, digits={digits}, speed={speed}; expected from 8, 1, 1 and two speeds in order")
    ink, labels = written(held_out)
    which = torch.randint(len(ink), (count, digits), generator=generator)
    room = float(side - 8)
    start = room * torch.rand(count, 1, digits, 2, generator=generator)
    angle = 2 * torch.pi * torch.rand(count, digits, generator=generator)
    rate = speed[0] + (speed[1] - speed[0]) * torch.rand(count, digits, 1, generator=generator)
    step = rate * torch.stack((angle.sin(), angle.cos()), -1)
    places = bounced(start + step[:, None] * torch.arange(frames)[:, None, None], room)
    axis = torch.arange(side, dtype=torch.float32)
    at = ((axis[:, None] - places[..., 0, None, None] + 0.5) / 4 - 1).expand(*places.shape[:3], side, side)
    across = ((axis - places[..., 1, None, None] + 0.5) / 4 - 1).expand_as(at)
    shown = ink[which][:, None].expand(-1, frames, -1, -1, -1).flatten(0, 2)[:, None]
    drawn = (
        F.grid_sample(shown, torch.stack((across, at), -1).flatten(0, 2), align_corners=False)
        if count
        else shown.new_zeros(0, 1, side, side)
    )
    whole = drawn.unflatten(0, places.shape[:3]).amax(2) if count else drawn.new_zeros(0, frames, 1, side, side)
    heading = (angle / (torch.pi / 2)).round().long() % 4
    return Moving(standard(whole), labels[which], places, heading)
