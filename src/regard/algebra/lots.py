"""Random numbers that depend on where they are drawn, not on how many were drawn before: the same in a whole pass and step by step."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of int64 taken as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's step and finaliser (Steele et al., 2014), of int64 that wraps."""
    x = x + signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def uniform(seed: int, *indices: Tensor) -> Tensor:
    """Numbers in [0, 1), float64, one for each entry of the integer indices, which broadcast; equal wherever seed and indices are."""
    state = mixed(torch.tensor(seed, dtype=torch.int64, device=indices[0].device))
    for index in indices:
        state = mixed(state ^ mixed(index.to(torch.int64)))
    return shifted(state, 11).to(torch.float64) * 2.0**-53


__all__ = ["uniform"]
