"""Beam search over any decoder that takes a word at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RegardError

State = tuple[Tensor, ...]
Next = Callable[[Tensor | None, State], tuple[Tensor, State]]


class Beam(NamedTuple):
    """words, the end's included where it was reached, and their log probability."""

    words: tuple[int, ...]
    log_p: float


def beam_search(step: Next, state: State, width: int = 1, max_length: int = 30, end: int = 0, per_word: bool = False) -> list[Beam]:
    """The likeliest sequences of one input, best first, at most `width`.

    step(words (K,) int, None before the first; state) -> (log probabilities (K, V), state); state: tensors whose first dimension is of hypotheses,
    one at the start. A hypothesis that tells `end` is finished and narrows the beam by one; those alive at max_length count as they stand.
    per_word: order by log probability over length. width=1: greedy.
    """
    if width < 1 or max_length < 1:
        raise RegardError(f"width={width}, max_length={max_length}; expected at least 1 each")
    finished: list[Beam] = []
    alive: list[Beam] = [Beam((), 0.0)]
    words: Tensor | None = None
    for _ in range(max_length):
        log_p, state = step(words, state)
        scores = log_p + log_p.new_tensor([beam.log_p for beam in alive])[:, None]
        best, at = scores.flatten().topk(min(width - len(finished), scores.numel()))
        rows, told = at // log_p.shape[1], at % log_p.shape[1]
        grown = [Beam((*alive[r].words, w), p) for r, w, p in zip(rows.tolist(), told.tolist(), best.tolist(), strict=True)]
        finished += [beam for beam in grown if beam.words[-1] == end]
        live = [i for i, beam in enumerate(grown) if beam.words[-1] != end]
        alive = [grown[i] for i in live]
        if not alive:
            break
        kept = torch.tensor(live, device=at.device)
        state, words = tuple(x[rows[kept]] for x in state), told[kept]
    return sorted(finished + alive, key=lambda beam: beam.log_p / (len(beam.words) if per_word else 1), reverse=True)
