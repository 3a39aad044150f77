"""Names that are there at once and imported on first use, so that `import regard` needs no PyTorch."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

_catalogue: list[str] = []


def load(package: str, table: Mapping[str, str], name: str, root: str = "regard.zoo") -> Any:
    """What `name` is, for a package's `__getattr__`: a table name -> module below `root`, imported on first use."""
    if name in table:
        return getattr(importlib.import_module(f"{root}.{table[name]}"), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def listed(space: Mapping[str, Any], table: Mapping[str, str]) -> list[str]:
    """A package's `__dir__`: what it holds and what it would load."""
    return sorted({*space, *table})


def name_catalogue(where: str) -> None:
    """Say where names become descriptions, "module.function": the engine asks, and knows nothing of the catalogue."""
    _catalogue[:] = [where]
    catalogue.cache_clear()


@functools.cache
def catalogue() -> Callable[[str], Any]:
    """The function that makes a name a description."""
    module, _, name = _catalogue[0].rpartition(".")
    found: Callable[[str], Any] = getattr(importlib.import_module(module), name)
    return found
