"""The tasks of `regard compare --task`, for layers of images: what each draws, how many classes it has and how large its images are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tasks.digits import digits
from ...tasks.shapes import SHAPES, TEXTURES, textured_shapes

Drawing = Callable[[int, torch.Generator, int, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pictures:
    """draw(count, generator, side, held_out) -> images (count, 3, side, side), labels (count,). side: the least and the usual one."""

    classes: int
    draw: Drawing
    side: int = 8


def of_digits(least: int = 8, **options: Any) -> Pictures:
    def draw(count: int, generator: torch.Generator, side: int, held_out: bool) -> tuple[Tensor, Tensor]:
        return digits(count, generator, side, held_out, "plain", **options)[:2]

    return Pictures(10, draw, least)


def of_shapes(answer: str, classes: int) -> Pictures:
    def draw(count: int, generator: torch.Generator, side: int, held_out: bool) -> tuple[Tensor, Tensor]:
        drawn = textured_shapes(count, generator, side)  # endless: what is held out is never drawn again
        return drawn.images, getattr(drawn, answer)

    return Pictures(classes, draw, 16)


TASKS = {
    "digits": of_digits(),
    "occluded-digits": of_digits(occluded=0.25),
    "shifted-digits": of_digits(16, shift=0.25, scale=(0.5, 0.6)),
    "shapes": of_shapes("shape", len(SHAPES)),
    "textures": of_shapes("texture", len(TEXTURES)),
}
