"""What `regard show` prints, read off the records, the sources and `cards.json`, so that nothing has to be imported to answer.

`cards.json` holds, of each working row, the lines that its own code says (made by scripts/cards.py from `regard.lab.card`).
"""

from __future__ import annotations

import ast
import functools
import json
from importlib import resources

from ..errors import RegardError, nearest
from .records import Record, records
from .registry import Entry, index


@functools.cache
def made() -> dict[str, list[str]]:
    """Lines by name: hyperparameters, inputs, executors and cost, or how a layer or function is called; then the checks."""
    found: dict[str, list[str]] = json.loads(resources.files(__package__).joinpath("cards.json").read_text(encoding="utf-8"))
    return found


def formula(entry: Entry) -> str:
    """The docstring of the file a row stands in."""
    _, *folders, file = entry.module.split(".")
    source = resources.files("regard").joinpath(*folders, f"{file}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def place(record: Record) -> str:
    """Where a row lives, or will, below `regard.zoo` and `regard.lab.checks`."""
    return f"{record.family}/{record.slug.replace('-', '_')}.py"


def record_of(name: str) -> Record | None:
    """The row of a name, None for the baseline; RegardError for a name that is neither."""
    known = {record.slug: record for record in records()}
    if name not in known and name not in index():
        raise RegardError(f"{name!r} is not in the catalogue.{nearest(name, known)}")
    return known.get(name)


def card(name: str) -> str:
    """The text of a system's card; RegardError for a name that neither is a row of the catalogue nor the baseline."""
    record, entry = record_of(name), index().get(name)
    lines = [f"{name}: {record.title} ({record.year})" if record else f"{name}: the baseline"]
    if record:
        lines += [f"id {record.id}, family {record.family}, {record.status}" + (f", {record.entry}" if record.entry else "")]
        lines += [f"file regard/zoo/{place(record)}, checks regard/lab/checks/{place(record)}", "", "parts: " + ", ".join(record.parts)]
    if entry:
        lines += ["", formula(entry), "", *made().get(name, [])]
    if record:
        lines += [] if entry else ["", record.math]
        lines += ["", "claim: " + record.claim, "", "check: " + record.check]
    return "\n".join(lines)
