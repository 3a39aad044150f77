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


def voices(
    count: int, generator: torch.Generator, samples: int = 4000, sources: int = 2, rate: int = 8000, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mixtures (count, samples) and their sources (count, sources, samples), each like a voiced speaker: a pitch of its own, from 90 Hz on, a fifth or more
    apart between sources, that glides by a tenth; its first twelve harmonics below `rate` / 2, weighed by two resonances that are drawn anew for each of
    its syllables, three to five a second, between which it is silent; loudness 1 over a whole source."""
    time = torch.arange(samples) / rate
    base = 90 * 1.5 ** torch.arange(sources) * (1 + 0.2 * torch.rand(count, sources, generator=generator))
    glide, turn, beat, lag = torch.rand(4, count, sources, 1, generator=generator)
    pitch = base[..., None] * (1 + 0.1 * torch.sin(2 * torch.pi * ((0.5 + glide) * time + turn)))
    phase = 2 * torch.pi * pitch.cumsum(-1) / rate
    pace = (3 + 2 * beat) * time + lag
    syllable, envelope = pace.floor().long(), torch.sin(torch.pi * pace.remainder(1)).square()
    low, high = torch.rand(2, count, sources, int(5 * samples / rate) + 3, generator=generator)
    first, second = (300 + 500 * low).gather(2, syllable), (1000 + 1500 * high).gather(2, syllable)
    found = torch.zeros(count, sources, samples)
    for harmonic in range(1, 13):
        at = harmonic * pitch
        weight = torch.exp(-((at - first) / 150).square() / 2) + 0.5 * torch.exp(-((at - second) / 250).square() / 2) + 0.05
        found = found + torch.where(at < rate / 2, weight, 0.0) * torch.sin(harmonic * phase)
    found = found * envelope
    found = found / found.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)
    mixture = found.sum(1)
    return mixture + noise * torch.randn(mixture.shape, generator=generator), found
