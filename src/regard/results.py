"""What experiments and measurements find: small dataclasses that print as tables, plot themselves and become data frames."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import MissingDependency, RegardError
from .plots import Plot, bars, figure

Column = Sequence[Any]


def numbers_of(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    """(name, number) or (name, list of numbers) of what a field holds; nothing of models, matrices and other things."""
    if isinstance(x, (bool, int, float, str)):
        yield name, x
    elif isinstance(x, Tensor) and x.dim() < 2:
        yield name, x.detach().cpu().tolist()
    elif isinstance(x, (list, tuple)) and all(isinstance(one, (bool, int, float)) for one in x):
        yield name, list(x)
    elif isinstance(x, Mapping):
        for key, one in x.items():
            yield from numbers_of(f"{name} {key}", one)


def shown(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


class Result:
    """A dataclass whose numbers are its table. Its lists of numbers, of the length most of them have, are the columns; where it has none, its numbers are
    a row; else they stand below the printed table. What a class has of another form it says by a `columns` of its own."""

    def fields(self) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            yield from numbers_of(field.name, getattr(self, field.name))

    def columns(self) -> dict[str, Column]:
        """The table: columns of one length by name."""
        found = dict(self.fields())
        lists = {name: x for name, x in found.items() if isinstance(x, list) and x}
        if not lists:
            return {name: [x] for name, x in found.items() if not isinstance(x, list)}
        length = Counter(map(len, lists.values())).most_common(1)[0][0]
        return {name: x for name, x in lists.items() if len(x) == length}

    def plot(self) -> Plot:
        """Lines over the first column, or over the number of the row where that does not rise; bars where the table is one row."""
        title, table = type(self).__name__, self.columns()
        shown = {name: x for name, x in table.items() if x and all(isinstance(one, (bool, int, float)) for one in x)}
        if not shown:
            raise RegardError(f"{title} has no numbers to plot; it is empty")
        if all(len(x) == 1 for x in shown.values()):
            return bars(title, {name: float(x[0]) for name, x in shown.items()})
        first, *others = shown
        rises = bool(others) and all(a < b for a, b in zip(shown[first], shown[first][1:], strict=False))
        across = shown[first] if rises else range(len(shown[first]))
        lines = {name: [(float(a), float(b)) for a, b in zip(across, shown[name], strict=True)] for name in (others if rises else shown)}
        return figure(title, first if rises else "row", "value", lines)

    def to_pandas(self) -> Any:
        """The table as a data frame."""
        try:
            import pandas
        except ImportError as missing:
            raise MissingDependency("to_pandas needs pandas: pip install pandas") from missing
        return pandas.DataFrame({name: list(x) for name, x in self.columns().items()})

    def __rich__(self) -> Any:
        from rich.table import Table

        found = self.columns()
        told = [f"{name} {shown(x)}" for name, x in self.fields() if not isinstance(x, list) and name not in found]
        table = Table(title=type(self).__name__, caption=", ".join(told))
        for name in found:
            table.add_column(name, justify="right")
        for row in zip(*found.values(), strict=True):
            table.add_row(*map(shown, row))
        return table
