"""regard: one engine for attention. Name or describe a mechanism; run it fast on CPU and GPU; compare it honestly."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import algebra
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
from .catalog.registry import describe as _describe
from .engine import Plan, Stats, merge, plan, step, weights
from .engine.door import attend, attend_with_stats
from .engine.names import names_resolver
from .errors import MissingDependency, RegardError

names_resolver(_describe)

try:
    __version__ = version("regard")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"

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


def __getattr__(name: str) -> Any:
    """Sub-packages load when first used, so that `import regard` stays fast."""
    if name in ("adapt", "catalog", "engine", "interpret", "lab", "models", "nn", "parallel", "search", "taps", "tasks", "zoo"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'regard' has no attribute {name!r}")
