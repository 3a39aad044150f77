"""Questions with labelled answers: which option holds the item that is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError

BEGIN, MARK, END, ASK = range(4)  # in front of all, behind a label, behind an option, before the answer
WORDS = 4


@dataclass(frozen=True)
class Choices:
    """ids (B, T): BEGIN item, then for each option label MARK item END, then ASK; labels (B, n): their ids in order; correct (B,): which option is
    right; places (n,): where the labels stand."""

    ids: Tensor
    labels: Tensor
    correct: Tensor
    places: Tensor

    @property
    def answer(self) -> Tensor:
        """(B,): the id of the right label."""
        return self.labels.gather(1, self.correct[:, None])[:, 0]

    def centred(self, logits: Tensor) -> Tensor:
        """logits (B, vocab) of the answer -> (B,): the right label's, less the mean over the labels shown."""
        shown = logits.gather(1, self.labels.to(logits.device))
        return shown.gather(1, self.correct[:, None].to(logits.device))[:, 0] - shown.mean(1)

    def accuracy(self, logits: Tensor) -> float:
        """Share of rows whose right label has the greatest logit of those shown."""
        return float((logits.gather(1, self.labels.to(logits.device)).argmax(1).cpu() == self.correct).double().mean())


def choices(
    count: int,
    generator: torch.Generator,
    *,
    options: int = 4,
    items: int = 20,
    alphabets: int = 2,
    alphabet: int = 0,
    labels: str = "standard",
    mark: int = MARK,
) -> Choices:
    """Ids from WORDS on are items, then `alphabets` alphabets of `options` labels each. alphabet: which is used. labels: "standard", in order;
    "shuffled"; "random": any of all alphabets, in any order. mark: what stands behind a label."""
    if not 2 <= options <= items or not 0 <= alphabet < alphabets or labels not in ("standard", "shuffled", "random"):
        raise RegardError(
            f"options={options}, items={items}, alphabet={alphabet} of {alphabets}, labels={labels!r}; expected 2 .. items options, and labels standard, shuffled or random"
        )
    first = WORDS + items
    if labels == "random":
        shown = first + torch.rand(count, alphabets * options, generator=generator).argsort(1)[:, :options]
    elif labels == "shuffled":
        shown = first + alphabet * options + torch.rand(count, options, generator=generator).argsort(1)
    else:
        shown = (first + alphabet * options + torch.arange(options)).expand(count, -1)
    item = WORDS + torch.rand(count, items, generator=generator).argsort(1)[:, :options]
    correct = torch.randint(options, (count,), generator=generator)
    full = lambda x: torch.full((count, options), x)  # noqa: E731
    body = torch.stack((shown, full(mark), item, full(END)), 2).flatten(1)
    ask = item.gather(1, correct[:, None])
    ids = torch.cat((full(BEGIN)[:, :1], ask, body, full(ASK)[:, :1]), 1)
    return Choices(ids, shown, correct, 2 + 4 * torch.arange(options))


def vocabulary(options: int = 4, items: int = 20, alphabets: int = 2) -> int:
    return WORDS + items + alphabets * options
