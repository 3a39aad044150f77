"""Public names of a package that live elsewhere: a table name -> module of the zoo, read when a name is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def load(package: str, table: Mapping[str, str], name: str) -> Any:
    """What `name` is, for a package's `__getattr__`: imported on first use."""
    if name in table:
        return getattr(importlib.import_module(f"regard.zoo.{table[name]}"), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def listed(space: Mapping[str, Any], table: Mapping[str, str]) -> list[str]:
    """A package's `__dir__`: what it holds and what it would load."""
    return sorted({*space, *table})
