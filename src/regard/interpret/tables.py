"""Numbers of heads: a table (layers, heads) that prints, plots and names its greatest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingDependency, RegardError
from ..plots import heatmap

Head = tuple[int, int]


@dataclass(frozen=True)
class HeadTable:
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

    def plot(self) -> str:
        """A heat map as SVG."""
        return heatmap(self.what, "head", "layer", self.scores.double().tolist())

    def to_pandas(self) -> Any:
        """A data frame with columns layer, head and score."""
        try:
            import pandas
        except ImportError as missing:
            raise MissingDependency("to_pandas needs pandas: pip install pandas") from missing
        return pandas.DataFrame([(*at, float(self.scores[at])) for at in self.heads], columns=["layer", "head", self.what])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.what)
        for name in ("layer", *(f"head {head}" for head in range(self.scores.shape[1]))):
            table.add_column(name, justify="right")
        for layer, row in enumerate(self.scores.tolist()):
            table.add_row(str(layer), *("" if x != x else f"{x:.3f}" for x in row))
        return table


def table_of(rows: Iterable[Tensor], what: str) -> HeadTable:
    """One row a layer, of as many heads as it has."""
    found = [row.detach().double().cpu() for row in rows]
    width = max(len(row) for row in found)
    return HeadTable(torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=float("nan")) for row in found]), what)
