"""Real images that come with packages: scikit-learn's handwritten digits, and the sample photographs of scikit-image and scikit-learn.

All images are (3, side, side), (grey value - 1/2) / (1/4) with grey values from 0 to 1.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingDependency, RegardError

NATURE = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "moon", "retina", "rocket")
SAMPLES = ("china.jpg", "flower.jpg")
HELD_OUT = 360  # digits nobody is trained on


class Drawn(NamedTuple):
    """images (B, 3, side, side), labels (B,), ink (B, side, side): how much of each pixel the digit covers, 0 to 1."""

    images: Tensor
    labels: Tensor
    ink: Tensor


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        raise MissingDependency(f"images of regard.tasks.digits need {name}: pip install 'regard[vision]'") from missing


def standard(grey: Tensor) -> Tensor:
    return (grey - 0.5) / 0.25


@functools.cache
def written(held_out: bool = False) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: ink (n, 8, 8) from 0 to 1 and labels (n,); 1437 to train on, 360 others if held_out."""
    found = package("sklearn.datasets").load_digits()
    ink, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(ink), generator=torch.Generator().manual_seed(0))
    kept = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    return ink[kept], labels[kept]


@functools.cache
def photographs(size: int = 128) -> tuple[Tensor, ...]:
    """The sample photographs, (3, H, W) from 0 to 1, the shorter side `size` pixels; grey ones have three equal channels."""
    shown = [getattr(package("skimage.data"), name)() for name in NATURE]
    shown += [package("sklearn.datasets").load_sample_image(name) for name in SAMPLES]
    found = []
    for values in shown:
        x = torch.tensor(values, dtype=torch.float32) / 255
        x = x[..., None].expand(-1, -1, 3) if x.dim() == 2 else x[..., :3]
        scale = size / min(x.shape[:2])
        shape = [round(scale * length) for length in x.shape[:2]]
        found.append(F.interpolate(x.permute(2, 0, 1)[None], shape, mode="bilinear", antialias=True)[0])
    return tuple(found)


def photo_patches(count: int, generator: torch.Generator, side: int = 32, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Pieces of photographs (count, 3, side, side) and which photograph each is of (count,); those held out are of its rightmost quarter,
    which no other touches. A half are mirrored."""
    pictures, found = photographs(), [torch.zeros(0, 3, side, side)]
    which = torch.randint(len(pictures), (count,), generator=generator)
    for number in which.tolist():
        x = pictures[number]
        border = max(x.shape[2] - x.shape[2] // 4, side)
        x = x[:, :, -max(x.shape[2] // 4, side) :] if held_out else x[:, :, :border]
        top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in x.shape[1:])
        piece = x[:, top : top + side, left : left + side]
        found.append((piece.flip(-1) if torch.rand((), generator=generator) < 0.5 else piece)[None])
    return standard(torch.cat(found)), which


def rotated(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Square images, each turned by 0 to 3 quarters, and by how many: a task without labels (Gidaris et al., 2018)."""
    turns = torch.randint(4, (len(images),), generator=generator)
    return torch.stack([images.rot90(turn, (2, 3)) for turn in range(4)], 1)[torch.arange(len(images)), turns], turns


def placed(ink: Tensor, generator: torch.Generator, side: int, shift: float, scale: tuple[float, float], turn: float) -> Tensor:
    """Ink (B, 8, 8) at (B, side, side), drawn `scale` times as large as the image, turned up to `turn` radians, moved up to `shift` of it."""
    count = len(ink)
    if not count:
        return ink.new_zeros(0, side, side)
    size = scale[0] + (scale[1] - scale[0]) * torch.rand(count, generator=generator)
    angle = turn * (2 * torch.rand(count, generator=generator) - 1)
    moved = 2 * shift * (2 * torch.rand(count, 2, generator=generator) - 1)
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
    where = torch.cat((rows, -(rows @ moved[..., None])), -1)
    grid = F.affine_grid(where, [count, 1, side, side], align_corners=False)
    return F.grid_sample(ink[:, None], grid, align_corners=False)[:, 0].clamp(0, 1)


def digits(
    count: int,
    generator: torch.Generator,
    side: int = 32,
    held_out: bool = False,
    background: str = "photograph",
    shift: float = 0.1,
    scale: tuple[float, float] = (0.7, 1.0),
    turn: float = 0.2,
    occluded: float = 0.0,
) -> Drawn:
    """Digits, up-sampled, each at a place, size and angle of its own.

    background: "photograph": where there is ink, a piece of a photograph is inverted; "plain": ink of 1 on 0. occluded: the share of the
    image's height that a grey bar across a random place hides. MissingDependency: without scikit-learn, or scikit-image for photographs.
    """
    if background not in ("photograph", "plain") or side < 8 or not 0 <= occluded < 1 or count < 0:
        raise RegardError(
            f"background={background!r}, side={side}, occluded={occluded}, count={count}; "
            "expected 'photograph' or 'plain', at least 8 pixels, a share below 1, and a count from 0"
        )
    all_ink, all_labels = written(held_out)
    which = torch.randint(len(all_ink), (count,), generator=generator)
    ink = placed(all_ink[which], generator, side, shift, scale, turn)
    if background == "plain":
        images = standard(ink)[:, None].expand(-1, 3, -1, -1).clone()
    else:
        behind, _ = photo_patches(count, generator, side, held_out)
        images = behind * (1 - 2 * ink[:, None])  # standard values are odd about grey: inverting is a change of sign
    if occluded:
        high = round(occluded * side)
        top = torch.randint(side - high + 1, (count,), generator=generator)
        rows = torch.arange(side)
        bar = (rows >= top[:, None]) & (rows < top[:, None] + high)
        images, ink = images.masked_fill(bar[:, None, :, None], 0.0), ink.masked_fill(bar[..., None], 0.0)
    return Drawn(images, all_labels[which], ink)
