"""Small documents made of words, with labels that follow from which words return: repeated words, sentences to pick, topics that change."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError

BEGIN, END = 0, 1  # of a sentence; words are numbered from 2
WORDS = 2
Batch = tuple[Tensor, Tensor]


def repeats(count: int, generator: torch.Generator, length: int = 24, vocab: int = 200) -> Batch:
    """ids (count, length) drawn evenly, and for each token whether it stands elsewhere too, (count, length) 0 or 1."""
    ids = torch.randint(vocab, (count, length), generator=generator)
    return ids, ((ids[:, :, None] == ids[:, None]).sum(2) > 1).long()


def summaries(count: int, generator: torch.Generator, sentences: int = 5, words: int = 5, vocab: int = 100) -> Batch:
    """ids (count, sentences (words + 2)): BEGIN words END, again and again, no word twice but one, which stands in two sentences: labels
    (count, sentences), 1 for these two."""
    size = sentences * words
    if vocab < size or sentences < 2:
        raise RegardError(
            f"vocab={vocab}, sentences={sentences}, words={words}; expected as many words as there are places, and two sentences"
        )
    drawn = torch.rand(count, vocab, generator=generator).argsort(1)[:, :size].view(count, sentences, words) + WORDS
    pair = torch.rand(count, sentences, generator=generator).argsort(1)[:, :2]
    at = torch.randint(words, (count, 2), generator=generator)
    row = torch.arange(count)
    drawn[row, pair[:, 1], at[:, 1]] = drawn[row, pair[:, 0], at[:, 0]]
    begin, end = (drawn.new_full((count, sentences, 1), x) for x in (BEGIN, END))
    return torch.cat((begin, drawn, end), 2).flatten(1), torch.zeros(count, sentences, dtype=torch.long).scatter_(1, pair, 1)


def topic_changes(count: int, generator: torch.Generator, words: int = 8, shared: int = 3, vocab: int = 100) -> Batch:
    """ids (count, 2 words + 3): BEGIN left END right END; `shared` words of the left return on the right where the topic goes on (label 0), else
    none does (label 1), (count,)."""
    if vocab < 2 * words or not 1 <= shared <= words:
        raise RegardError(f"vocab={vocab}, words={words}, shared={shared}; expected vocab >= 2 words, 1 <= shared <= words")
    drawn = torch.rand(count, vocab, generator=generator).argsort(1)[:, : 2 * words] + WORDS
    left, right = drawn[:, :words], drawn[:, words:].clone()
    change = torch.randint(2, (count,), generator=generator)
    right[:, :shared] = torch.where(change[:, None] == 1, right[:, :shared], left[:, :shared])
    right = right.gather(1, torch.rand(count, words, generator=generator).argsort(1))
    begin, end = (torch.full((count, 1), x) for x in (BEGIN, END))
    return torch.cat((begin, left, end, right, end), 1), change
