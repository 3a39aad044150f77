"""Items and their labels in a row, and an item whose label is asked for: told by the context, by the weights, or by both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError


@dataclass(frozen=True)
class Asked:
    """tokens (count, 2 N + 1, positions + D); label (count,) the right answer; items, labels (count, N): class and label number of each pair, classes
    of novel sequences numbered anew; item (count,): the query's class."""

    tokens: Tensor
    label: Tensor
    items: Tensor
    labels: Tensor
    item: Tensor


@dataclass(frozen=True)
class ItemLabels:
    """classes, embeddings: centres (K, D) of classes and (L, D) of labels; class k has label k mod L. noise: eps, items are
    (centre + eps N(0, I / D)) / sqrt(1 + eps^2). power: class k is drawn with probability ~ (k + 1) ** -power. slots: N at most, so that there are
    2 slots + 1 positions. novel: classes that are made anew for novel sequences."""

    classes: Tensor
    embeddings: Tensor
    noise: float = 0.1
    power: float = 0.0
    slots: int = 32
    novel: int = 128

    def __post_init__(self) -> None:
        for name, count in (("classes", len(self.classes)), ("novel", self.novel)):
            if count % len(self.embeddings) or not count:
                raise RegardError(f"{name}={count}; expected a multiple of the {len(self.embeddings)} labels")
        if self.classes.shape[1] != self.embeddings.shape[1] or self.noise < 0 or self.slots < 1:
            raise RegardError(
                f"classes {tuple(self.classes.shape)}, labels {tuple(self.embeddings.shape)}, noise={self.noise}, slots={self.slots}; expected one width, "
                "noise >= 0, slots >= 1"
            )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return 2 * self.slots + 1 + self.classes.shape[1]

    def items(self, centres: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(centres.shape, generator=generator, dtype=centres.dtype) / centres.shape[-1] ** 0.5
        return (centres + self.noise * drawn) / (1 + self.noise**2) ** 0.5

    def chosen(self, count: int, pairs: int, copies: int, classes: int, distinct: bool, generator: torch.Generator) -> Tensor:
        """(count, pairs): pairs / copies classes, each `copies` times, in any order. distinct: no two of them of one label."""
        labels, kinds = len(self.embeddings), pairs // copies
        if distinct:
            if kinds > labels:
                raise RegardError(f"distinct: {kinds} classes in a sequence have {labels} labels; expected as many labels at least")
            label = torch.rand(count, labels, generator=generator).argsort(1)[:, :kinds]
            found = label + labels * torch.randint(classes // labels, (count, kinds), generator=generator)
        elif classes == len(self.classes):
            found = self.any(count, kinds, generator)
        else:
            found = torch.randint(classes, (count, kinds), generator=generator)
        order = torch.rand(count, pairs, generator=generator).argsort(1)
        return found.repeat(1, copies).gather(1, order)

    def any(self, count: int, pairs: int, generator: torch.Generator) -> Tensor:
        odds = torch.arange(1, len(self.classes) + 1, dtype=torch.float64) ** -self.power
        return torch.multinomial(odds, count * pairs, True, generator=generator).view(count, pairs)

    def draw(
        self,
        count: int,
        generator: torch.Generator,
        *,
        pairs: int = 8,
        copies: int = 2,
        bursty: float = 1.0,
        novel: float = 0.0,
        flip: bool = False,
        distinct: bool = False,
    ) -> Asked:
        """pairs: N. copies: B. bursty: share p_B of sequences whose query is one of the context's classes; the others draw all from the classes'
        odds. novel: share p_C of (bursty) sequences of classes made anew. flip: the context gives each class the next label, which is then right."""
        if not 1 <= pairs <= self.slots or copies < 1 or pairs % copies or not 0 <= bursty <= 1 or not 0 <= novel <= 1:
            raise RegardError(
                f"pairs={pairs}, copies={copies}, bursty={bursty}, novel={novel}; expected pairs of 1 .. {self.slots}, a multiple of copies, and shares"
            )
        labels = len(self.embeddings)

        def some(share: float) -> Tensor:
            return torch.rand(count, generator=generator) <= share if share else torch.zeros(count, dtype=torch.bool)

        items = self.chosen(count, pairs, copies, len(self.classes), distinct, generator)
        item = items.gather(1, torch.randint(pairs, (count, 1), generator=generator))[:, 0]
        loose, fresh = ~some(bursty), some(novel)
        alone = self.any(count, pairs + 1, generator)
        items, item = torch.where(loose[:, None], alone[:, :-1], items), torch.where(loose, alone[:, -1], item)
        other = self.chosen(count, pairs, copies, self.novel, distinct, generator)
        wanted = other.gather(1, torch.randint(pairs, (count, 1), generator=generator))[:, 0]
        items, item = torch.where(fresh[:, None], other, items), torch.where(fresh, wanted, item)
        made = torch.randn(self.novel, self.classes.shape[1], generator=generator, dtype=self.classes.dtype) / self.classes.shape[1] ** 0.5
        both = torch.cat((self.classes, made))
        shift = fresh.long() * len(self.classes)
        step = (flip & ~fresh).long()
        shown = (items + step[:, None]) % labels
        content = both.new_empty(count, 2 * pairs + 1, both.shape[1])
        content[:, 0:-1:2] = self.items(both[items + shift[:, None]], generator)
        content[:, 1::2] = self.embeddings[shown]
        content[:, -1] = self.items(both[item + shift], generator)
        first = torch.randint(2 * (self.slots - pairs) + 1, (count, 1), generator=generator)
        places = F.one_hot(first + torch.arange(2 * pairs + 1), 2 * self.slots + 1).to(content)
        return Asked(torch.cat((places, content), 2), (item + step) % labels, items, shown, item)


def item_labels(
    classes: int,
    labels: int = 32,
    dim: int = 63,
    generator: torch.Generator | None = None,
    *,
    noise: float = 0.1,
    power: float = 0.0,
    slots: int = 32,
    novel: int = 128,
) -> ItemLabels:
    """Centres of classes and embeddings of labels drawn from N(0, I / dim)."""
    centres, embeddings = (torch.randn(n, dim, generator=generator) / dim**0.5 for n in (classes, labels))
    return ItemLabels(centres, embeddings, noise, power, slots, novel)
