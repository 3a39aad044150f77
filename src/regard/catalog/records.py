"""One record a row of the catalogue: what the paper claims, the math, and whether regard runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import RegardError, nearest
from .registry import entries as registered
from .shipped import rows


@dataclass(frozen=True)
class Record:
    """A row. status: "works" when a registered entry point exists, else "planned". entry: where it is in regard, or None."""

    id: int
    slug: str
    family: str
    kind: str
    modality: str
    short: str
    title: str
    year: int
    parts: tuple[str, ...]
    works_means: str
    math: str
    claim: str
    check: str
    status: str
    entry: str | None

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"parts": list(self.parts)}


def records(family: str | None = None, status: str | None = None) -> list[Record]:
    """All 307 records, or those of one family and status."""
    families = sorted({row["family"] for row in rows()})
    if family is not None and family not in families:
        raise RegardError(f"family={family!r}; expected one of {', '.join(families)}.{nearest(family, families)}")
    if status not in (None, "works", "planned"):
        raise RegardError(f"status={status!r}; expected works or planned")
    entries = registered()
    out = []
    for row in rows():
        found = entries.get(row["slug"])
        record = Record(
            **{**row, "parts": tuple(row["parts"])}, status="works" if found else "planned", entry=found.where if found else None
        )
        if family in (None, record.family) and status in (None, record.status):
            out.append(record)
    return out
