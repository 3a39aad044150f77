"""The catalogue's rows as shipped."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any


@functools.cache
def rows() -> tuple[dict[str, Any], ...]:
    """One dictionary a row, in order of id."""
    found = []
    for file in resources.files(__package__).joinpath("rows").iterdir():
        if file.name.endswith(".jsonl"):
            found += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return tuple(sorted(found, key=lambda row: row["id"]))
