"""What each head looks at, in numbers that need no map: sinks, neighbours, repeats, spread and reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import RegardError
from ..taps import Behind, ColumnMass, Entropy, Mass, MeanDistance, read
from .tables import HeadResult, HeadTable, table_of

TAIL = 16  # the last tokens are seen by too few queries for a mean


@dataclass(frozen=True)
class HeadViews(HeadResult):
    """Tables of means over queries. sink: weight on the first token; second: the greatest mean weight that another token gets from those behind it,
    and `places`, (layers, heads), which; previous: weight on the token before; entropy: in nats; distance: in tokens."""

    sink: HeadTable
    second: HeadTable
    places: Tensor
    previous: HeadTable
    entropy: HeadTable
    distance: HeadTable


@torch.no_grad()
def head_views(model: nn.Module, ids: Tensor) -> HeadViews:
    """A causal model's heads on one text, ids (1, L)."""
    if ids.dim() != 2 or len(ids) != 1 or ids.shape[1] <= 2 * TAIL:
        raise RegardError(f"ids has shape {tuple(ids.shape)}; expected one row of more than {2 * TAIL} tokens")
    with read(model, [ColumnMass(), Mass([0]), Behind(1), Entropy(), MeanDistance()]) as seen:
        model(ids)

    def means(name: str, what: str) -> HeadTable:
        return table_of((x[0, :, 1:].mean(1) for _, x in seen.items(name)), what)

    length = ids.shape[1]
    behind = torch.arange(length, 0, -1)  # queries that see a key
    given = [x[0, :, 1 : length - TAIL] / behind[1 : length - TAIL].to(x) for _, x in seen.items(ColumnMass().name)]
    best = [x.max(1) for x in given]
    places = table_of((b.indices + 1.0 for b in best), "place").scores
    return HeadViews(
        means("mass", "weight on the first token"),
        table_of((b.values for b in best), "greatest mean weight on another token"),
        places,
        means("behind", "weight on the token before"),
        means(Entropy().name, "entropy in nats"),
        means(MeanDistance().name, "mean distance in tokens"),
    )


@torch.no_grad()
def induction(model: nn.Module, vocab: Tensor, length: int = 128, rows: int = 4, begin: int | None = None, seed: int = 0) -> HeadTable:
    """The weight that tokens drawn from `vocab` (n,) give, when their sequence comes again, to the token that followed them the first time (Olsson et
    al., 2022): the mean over the second half of `rows` sequences. begin: a token in front of all."""
    if length < 2 or rows < 1 or not len(vocab):
        raise RegardError(f"length={length}, rows={rows}, vocab of {len(vocab)} ids; expected two tokens, a row and an id at least")
    half = vocab[torch.randint(len(vocab), (rows, length), generator=torch.Generator().manual_seed(seed))]
    first = [] if begin is None else [half.new_full((rows, 1), begin)]
    ids = torch.cat((*first, half, half), 1)
    with read(model, Behind(length - 1, "induction")) as seen:
        model(ids.to(next(model.parameters()).device))
    return table_of((x[:, :, -length:].mean((0, 2)) for _, x in seen.items("induction")), "weight on what came next before")
