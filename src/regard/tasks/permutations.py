"""Permutations one after another, whose composition must be kept track of: a state that sums cannot hold (Merrill et al., 2024)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..errors import RegardError


def permutation_states(count: int, length: int, generator: torch.Generator, size: int = 3) -> tuple[Tensor, Tensor]:
    """tokens (count, length), numbers of permutations of `size` things in lexicographic order, and labels (count, length): the number of the
    composition of all up to there, the newest applied last. size: 2 to 5 (5: no solvable group, out of reach of fixed depth)."""
    if not 2 <= size <= 5:
        raise RegardError(f"size={size}; expected 2 to 5")
    every = torch.tensor(list(itertools.permutations(range(size))))
    number = {tuple(one): at for at, one in enumerate(every.tolist())}
    table = torch.tensor([[number[tuple(new[old].tolist())] for new in every] for old in every])  # [old, new]: old first, then new
    tokens = torch.randint(len(every), (count, length), generator=generator)
    labels, state = torch.empty_like(tokens), tokens[:, 0] * 0
    for at in range(length):
        state = table[state, tokens[:, at]]
        labels[:, at] = state
    return tokens, labels
