"""Bits on patches whose labels say what a token mixer must do: meet two tokens, or only add tokens up."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError

Batch = tuple[Tensor, Tensor]


def bits(count: int, generator: torch.Generator, patches: int) -> tuple[Tensor, Tensor]:
    """Fair bits (count, patches), and tokens (count, patches, 1 + patches): the bit as -1 or 1, and the patch's place as one of N."""
    drawn = torch.randint(2, (count, patches), generator=generator)
    place = torch.eye(patches).expand(count, -1, -1)
    return drawn, torch.cat((2.0 * drawn[..., None] - 1, place), -1)


def exclusive_or(count: int, generator: torch.Generator, patches: int = 8, pair: tuple[int, int] = (0, 5)) -> Batch:
    """Whether two patches' bits differ: tokens (count, patches, 1 + patches), labels 0 or 1. What adds up tokens is right at most three times
    in four."""
    if not 0 <= min(pair) <= max(pair) < patches:
        raise RegardError(f"pair={pair}; expected two of the {patches} patches")
    drawn, x = bits(count, generator, patches)
    return x, drawn[:, pair[0]] ^ drawn[:, pair[1]]


def at_least(count: int, generator: torch.Generator, patches: int = 8, least: int = 4) -> Batch:
    """Whether at least `least` patches are bright: tokens (count, patches, 1 + patches), labels 0 or 1. Adding up tokens is enough."""
    drawn, x = bits(count, generator, patches)
    return x, (drawn.sum(1) >= least).long()
