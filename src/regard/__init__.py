"""regard: one engine for attention. Name or describe a mechanism; run it fast on CPU and GPU; compare it honestly."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import MissingDependency, RegardError
from .lazy import listed, load, name_catalogue

if TYPE_CHECKING:
    __version__: str
    from .algebra import (
        Additive,
        Alibi,
        Causal,
        Cosine,
        Distance,
        Dot,
        Full,
        Input,
        Mask,
        Neighborhood,
        Padding,
        Prefix,
        Recurrent,
        RelativeBias,
        Rope,
        RowLocal,
        RowWise,
        Segments,
        Sinks,
        Weighted,
        Window,
    )
    from .catalog import Record, get, names, records, register
    from .engine import Plan, Stats, merge, plan, step, weights
    from .engine.door import attend, attend_with_stats

name_catalogue("regard.catalog.registry.describe")

# Loaded when first used: a name from its module, a package as a whole.
_ALGEBRA = "Additive Alibi Causal Cosine Distance Dot Full Input Mask Neighborhood Padding Prefix Recurrent RelativeBias Rope RowLocal RowWise Segments Sinks Weighted Window"
_CATALOG = "Record get names records register"
_ENGINE = "Plan Stats merge plan step weights attend attend_with_stats"
_NAMES = {name: module for module, found in (("algebra", _ALGEBRA), ("catalog", _CATALOG), ("engine", _ENGINE)) for name in found.split()}
_PACKAGES = (
    "adapt",
    "algebra",
    "cache",
    "catalog",
    "engine",
    "generate",
    "interpret",
    "lab",
    "models",
    "nn",
    "parallel",
    "search",
    "taps",
    "tasks",
    "zoo",
)

__all__ = [
    "Additive",
    "Alibi",
    "Causal",
    "Cosine",
    "Distance",
    "Dot",
    "Full",
    "Input",
    "Mask",
    "MissingDependency",
    "Neighborhood",
    "Padding",
    "Plan",
    "Prefix",
    "Record",
    "Recurrent",
    "RegardError",
    "RelativeBias",
    "Rope",
    "RowLocal",
    "RowWise",
    "Segments",
    "Sinks",
    "Stats",
    "Weighted",
    "Window",
    "algebra",
    "attend",
    "attend_with_stats",
    "get",
    "merge",
    "names",
    "nn",
    "plan",
    "records",
    "register",
    "step",
    "taps",
    "weights",
]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("regard")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    found = load(__name__, _NAMES, name, __name__)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return listed(globals(), {**_NAMES, **dict.fromkeys(_PACKAGES, "")})
