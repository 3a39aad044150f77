"""Sounds added up, and how well they are told apart again."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from ..errors import RegardError


def tones(
    count: int, generator: torch.Generator, samples: int = 800, sources: int = 2, noise: float = 0.0, gap: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Mixtures (count, samples) and their sources (count, sources, samples): source k is a tone of its own band, of 8 to 8 (1 + gap) / 2 times gap^k
    periods in 800 samples, whose loudness swells and fades."""
    time = torch.arange(samples) / 800
    pitch = gap ** torch.arange(sources) * (8 + 4 * (gap - 1) * torch.rand(count, sources, generator=generator))
    phase, slow = torch.rand(2, count, sources, 1, generator=generator)
    loud = 0.6 + 0.4 * torch.sin(2 * torch.pi * (slow + (0.5 + slow) * time))
    found = loud * torch.sin(2 * torch.pi * (pitch[..., None] * time + phase))
    return found.sum(1) + noise * torch.randn(count, samples, generator=generator), found


def si_sdr(found: Tensor, truth: Tensor, eps: float = 1e-8) -> Tensor:
    """10 log10(|a s|^2 / |e - a s|^2), a = e . s / |s|^2, over the last dimension, of which the means are taken off first: decibels (Le Roux et al., 2019)."""
    e, s = (x - x.mean(-1, keepdim=True) for x in (found, truth))
    shown = (e * s).sum(-1, keepdim=True) / (s.square().sum(-1, keepdim=True) + eps) * s
    return 10 * torch.log10(shown.square().sum(-1) / ((e - shown).square().sum(-1) + eps) + eps)


def permuted_si_sdr(found: Tensor, truth: Tensor) -> Tensor:
    """The mean over sources of `si_sdr`, in the order of sources that is best: found, truth (B, K, T) -> (B,); its negative mean is the loss."""
    if found.shape != truth.shape or found.dim() != 3:
        raise RegardError(f"found {tuple(found.shape)}, truth {tuple(truth.shape)}; expected the same (batch, sources, samples)")
    each = si_sdr(found[:, :, None], truth[:, None])
    ways = [sum(each[:, mine, its] for mine, its in enumerate(order)) / len(order) for order in permutations(range(found.shape[1]))]
    return torch.stack(ways, -1).amax(-1)  # type: ignore[arg-type]
