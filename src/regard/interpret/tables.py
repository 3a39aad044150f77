"""Numbers of heads: a table (layers, heads) that prints, plots and names its greatest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from ..plots import Plot, heatmap
from ..results import Column, Result

Head = tuple[int, int]


@dataclass(frozen=True)
class HeadTable(Result):
    """scores (layers, heads): NaN where a layer has fewer heads. what: they are."""

    scores: Tensor
    what: str = "score"

    def __post_init__(self) -> None:
        if self.scores.dim() != 2:
            raise RegardError(f"scores has shape {tuple(self.scores.shape)}; expected (layers, heads)")

    @property
    def heads(self) -> list[Head]:
        """All heads there are, in order."""
        return [(int(layer), int(head)) for layer, head in (~self.scores.isnan()).nonzero()]

    def ranked(self, ascending: bool = False) -> list[Head]:
        """All heads by their score, the greatest first; equal ones in their order."""
        return sorted(self.heads, key=lambda at: float(self.scores[at]) * (1 if ascending else -1))

    def top(self, count: int) -> list[Head]:
        return self.ranked()[:count]

    def above(self, threshold: float) -> list[Head]:
        return [at for at in self.ranked() if float(self.scores[at]) >= threshold]

    def columns(self) -> dict[str, Column]:
        return {**heads_of({}, self.heads), self.what: [float(self.scores[at]) for at in self.heads]}

    def plot(self) -> Plot:
        """A heat map."""
        return heatmap(self.what, "head", "layer", self.scores.double().tolist())

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.what)
        for name in ("layer", *(f"head {head}" for head in range(self.scores.shape[1]))):
            table.add_column(name, justify="right")
        for layer, row in enumerate(self.scores.tolist()):
            table.add_row(str(layer), *("" if x != x else f"{x:.3f}" for x in row))
        return table


def heads_of(tables: Mapping[str, HeadTable], heads: Sequence[Head] | None = None) -> dict[str, Column]:
    """Columns layer and head, and one of each table's scores (NaN for heads that it has not)."""
    known = next(iter(tables.values())).heads if heads is None else heads
    scores = {name: [float(table.scores[at]) for at in known] for name, table in tables.items()}
    return {"layer": [layer for layer, _ in known], "head": [head for _, head in known], **scores}


class HeadResult(Result):
    """A result whose fields are tables of heads: a row a head, a column a table."""

    def tables(self) -> dict[str, HeadTable]:
        return {name: x for name, x in vars(self).items() if isinstance(x, HeadTable)}

    def columns(self) -> dict[str, Column]:
        return heads_of(self.tables())

    def plot(self, name: str | None = None) -> Plot:
        """One of the tables, the first without a name."""
        known = self.tables()
        if name is not None and name not in known:
            raise RegardError(f"name={name!r}; expected one of {', '.join(known)}")
        return (next(iter(known.values())) if name is None else known[name]).plot()


def table_of(rows: Iterable[Tensor], what: str) -> HeadTable:
    """One row a layer, of as many heads as it has."""
    found = [row.detach().double().cpu() for row in rows]
    width = max(len(row) for row in found)
    return HeadTable(torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=float("nan")) for row in found]), what)
