"""Documents that hold the evidence of one query each, at a known place, and how well they are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError

PAD = 0


@dataclass(frozen=True)
class Evidence:
    """queries (Q, span): ids. documents (Q, T): ids, PAD behind `lengths` (Q,); document n answers query n with its tokens [start, stop), (Q,)
    each."""

    queries: Tensor
    documents: Tensor
    lengths: Tensor
    start: Tensor
    stop: Tensor

    @property
    def keep(self) -> Tensor:
        """(Q, T) bool: tokens of documents that are no padding."""
        return torch.arange(self.documents.shape[1]) < self.lengths[:, None]

    @property
    def place(self) -> Tensor:
        """(Q,): the middle of the evidence as a share of the document's length."""
        return ((self.start + self.stop).double() / 2 / self.lengths).clamp(0, 1)


def evidence(
    lengths: Sequence[int],
    generator: torch.Generator,
    *,
    places: Sequence[float] | None = None,
    span: int = 8,
    fillers: int = 50,
    words: int = 500,
    translation: Tensor | None = None,
) -> Evidence:
    """A document of each length: fillers drawn from ids 1 .. fillers, and somewhere `span` different words from fillers + 1 .. fillers + words.
    The query is these words in another order.

    places: for each document, where its evidence is, as a share of what is possible (None: drawn evenly). translation (1 + fillers + words,): the id
    in the query's language of every id of the documents' (None: the same language).
    """
    count, first = len(lengths), fillers + 1
    if not count or min(lengths) < span or not 1 <= span <= words or fillers < 1:
        raise RegardError(
            f"lengths={list(lengths)[:5]}.., span={span}, words={words}, fillers={fillers}; expected lengths >= span, 1 <= span <= words"
        )
    if places is not None and (len(places) != count or not all(0 <= x <= 1 for x in places)):
        raise RegardError(f"places has {len(places)} numbers; expected one in [0, 1] for each of {count} documents")
    if translation is not None and translation.shape != (first + words,):
        raise RegardError(f"translation has shape {tuple(translation.shape)}; expected ({first + words},)")
    size = torch.tensor(list(lengths))
    at = torch.rand(count, generator=generator, dtype=torch.float64) if places is None else torch.tensor(list(places), dtype=torch.float64)
    start = (at * (size - span)).round().long()
    said = first + torch.rand(count, words, generator=generator).argsort(1)[:, :span]
    documents = torch.randint(1, first, (count, int(size.max())), generator=generator)
    documents = documents.scatter(1, start[:, None] + torch.arange(span), said)
    documents = documents.masked_fill(torch.arange(documents.shape[1]) >= size[:, None], PAD)
    queries = said.gather(1, torch.rand(count, span, generator=generator).argsort(1))
    return Evidence(queries if translation is None else translation[queries], documents, size, start, start + span)


def ndcg(scores: Tensor, relevance: Tensor, k: int = 10) -> Tensor:
    """scores, relevance (Q, N) -> nDCG@k (Q,), gains linear in relevance; documents of equal score keep their order."""
    if scores.shape != relevance.shape or scores.dim() != 2 or k < 1:
        raise RegardError(f"scores {tuple(scores.shape)}, relevance {tuple(relevance.shape)}, k={k}; expected both (Q, N), k >= 1")
    if not bool(scores.isfinite().all()) or bool((relevance < 0).any()) or bool((relevance.amax(1) <= 0).any()):
        raise RegardError("scores must be finite, and every query needs a relevant document (relevance > 0, none negative)")
    gains = relevance.double().gather(1, scores.argsort(dim=1, descending=True, stable=True))[:, :k]
    ideal = relevance.double().sort(dim=1, descending=True).values[:, :k]
    discount = 1 / torch.arange(2, gains.shape[1] + 2, dtype=torch.float64, device=scores.device).log2()
    return (gains * discount).sum(1) / (ideal * discount).sum(1)
