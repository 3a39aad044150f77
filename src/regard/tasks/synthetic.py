"""Synthetic tasks with exact answers: multi-query associative recall and copying. Labels are -100 where nothing is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError

IGNORE = -100


def recall(count: int, length: int, pairs: int, vocab: int, generator: torch.Generator, power: float = 0.01) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall as Zoology defines it (Arora et al., 2023): tokens and labels, both (count, length).

    A sequence opens with `pairs` (key, value) pairs; keys come from the lower half of the vocabulary (0 is blank), values from
    the upper. Each key appears once more, at a random even gap after the pairs, gaps drawn with density ~ gap^(power - 1);
    there the model must give its value. Needs 4 * pairs <= length and pairs < vocab / 2.
    """
    if 4 * pairs > length or pairs >= vocab // 2:
        raise RegardError(f"pairs={pairs}: expected at most length/4 = {length // 4} and below vocab/2 = {vocab // 2}")
    keys = 1 + torch.rand(count, vocab // 2 - 1, generator=generator).argsort(-1)[:, :pairs]
    values = vocab // 2 + torch.rand(count, vocab - vocab // 2, generator=generator).argsort(-1)[:, :pairs]
    tokens, labels = torch.zeros(count, length, dtype=torch.long), torch.full((count, length), IGNORE)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    space = (length - 2 * pairs) // 2
    weight = power * torch.arange(1, space + 1, dtype=torch.float64) ** (power - 1)
    places = torch.multinomial((weight / weight.sum()).expand(count, -1), pairs, generator=generator)
    at = 2 * pairs + 2 * places
    tokens.scatter_(1, at, keys)
    labels.scatter_(1, at, values)
    return tokens, labels


def copying(count: int, length: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens, a blank, and the same tokens again, to be predicted one ahead: tokens and labels (count, length)."""
    half = length // 2
    word = torch.randint(1, vocab, (count, half), generator=generator)
    tokens = torch.cat((word, torch.zeros(count, 1, dtype=torch.long), word), 1)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, half : half + half] = word
    return tokens[:, :length], labels[:, :length]
