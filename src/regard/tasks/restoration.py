"""Pieces of photographs, and what a camera might have made of them: noisy, or small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError
from .digits import photo_patches

PEAK = 4.0  # from black to white, in the units of images: (grey value - 1/2) / (1/4)


def noisy_patches(
    count: int, generator: torch.Generator, side: int = 32, spread: float = 25 / 255, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """(noisy, clean), each (count, 3, side, side): white noise of deviation `spread`, grey values being 0 to 1. held_out: as of `photo_patches`."""
    if spread < 0:
        raise RegardError(f"spread={spread}; expected from 0")
    clean, _ = photo_patches(count, generator, side, held_out)
    return clean + PEAK * spread * torch.randn(clean.shape, generator=generator), clean


def small_patches(count: int, generator: torch.Generator, side: int = 32, scale: int = 2, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """(small (count, 3, side / scale, side / scale), whole (count, 3, side, side)): the first is the second, reduced bicubically against aliasing."""
    if scale < 1 or side % scale:
        raise RegardError(f"side={side}, scale={scale}; expected a scale that divides the side")
    whole, _ = photo_patches(count, generator, side, held_out)
    size = [side // scale] * 2
    return F.interpolate(whole, size, mode="bicubic", antialias=True) if scale > 1 else whole.clone(), whole


def psnr(found: Tensor, truth: Tensor, peak: float = PEAK) -> Tensor:
    """10 log10(peak^2 / mean square of found - truth), of each image (B, ...): decibels (B,)."""
    if found.shape != truth.shape or found.dim() < 2:
        raise RegardError(f"found {tuple(found.shape)}, truth {tuple(truth.shape)}; expected the same (batch, ...)")
    return 10 * torch.log10(peak**2 / (found - truth).square().flatten(1).mean(1))
