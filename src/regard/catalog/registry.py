"""Names: `register` puts a system in the catalogue, `get` makes its description, `names` lists what can be asked for."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..algebra import Mechanism
from ..errors import RegardError, nearest

Factory = Callable[..., Mechanism]


@dataclass(frozen=True)
class Entry:
    """A registered system. kind: "mechanism" (a description for `attend`), or "module" (a layer or function of its own)."""

    name: str
    factory: Callable[..., Any]
    kind: str
    where: str

    @property
    def formula(self) -> str:
        """The module's docstring: formula and paper."""
        return inspect.getdoc(inspect.getmodule(self.factory)) or ""

    @property
    def hyperparameters(self) -> inspect.Signature:
        return inspect.signature(self.factory)


_entries: dict[str, Entry] = {}
_described: dict[str, Mechanism] = {}
_loaded = False


def register(name: str, kind: str = "mechanism") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: put a factory of descriptions (or, with kind="module", a class or function) into the catalogue under `name`."""

    def put(factory: Callable[..., Any]) -> Callable[..., Any]:
        where = f"{factory.__module__}.{factory.__qualname__}"
        if name in _entries and _entries[name].where != where:
            raise RegardError(f"the name {name!r} is taken by {_entries[name].where}; choose another for {where}")
        _entries[name] = Entry(name, factory, kind, where)
        _described.pop(name, None)
        return factory

    return put


def entries() -> dict[str, Entry]:
    """Everything registered, the library's own mechanisms loaded."""
    global _loaded
    if not _loaded:
        _loaded = True
        for home in ("regard.mechanisms", "regard.lab.experiments"):
            package = importlib.import_module(home)
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        for home in ("regard.nn", "regard.search", "regard.parallel"):  # systems that are layers or procedures of their own
            importlib.import_module(home)
    return _entries


def names(kind: str | None = "mechanism") -> list[str]:
    """Names that `attend` and `regard.nn.Attention` take; kind="module" for the others, None for all."""
    return sorted(name for name, entry in entries().items() if kind in (None, entry.kind))


def entry(name: str) -> Entry:
    """The entry of a name; RegardError with the nearest names if there is none."""
    found = entries().get(name)
    if found is None:
        from .records import rows

        planned = name in {row["slug"] for row in rows()}
        why = "is planned, not working yet" if planned else "is not known"
        raise RegardError(f"mechanism {name!r} {why}.{'' if planned else nearest(name, names(None))} See `regard list`.")
    return found


def get(name: str, **hyperparameters: Any) -> Mechanism:
    """The description of a named mechanism with its hyperparameters; the defaults are the paper's."""
    found = entry(name)
    if found.kind != "mechanism":
        raise RegardError(f"{name!r} is a {found.kind}, not a mechanism for attend; use {found.where}")
    known = found.hyperparameters.parameters
    for key in hyperparameters:
        if key not in known:
            raise RegardError(f"{name!r} has no hyperparameter {key!r}; it has: {', '.join(known) or 'none'}.{nearest(key, known)}")
    return found.factory(**hyperparameters)  # type: ignore[no-any-return]


def describe(name: str) -> Mechanism:
    """`get(name)` with the defaults, made once; how the engine reads a name."""
    found = _described.get(name)
    if found is None:
        found = _described[name] = get(name)
    return found
