"""Names: `register` puts a system in the catalogue, `get` makes its description, `names` lists what can be asked for.

The library's own systems are found by their files, `regard.zoo.<family>.<slug>`: an index is read off the sources, and a file is
imported when its name is asked for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..errors import RegardError, nearest
from .shipped import rows

if TYPE_CHECKING:  # names are listed without PyTorch
    from ..algebra import Mechanism

REGISTERED = re.compile(r'^@register\("([^"]+)"(?:, kind="(\w+)")?\)\n(?:@.*\n)*(?:def|class) (\w+)', re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """A registered system. kind: "mechanism" (a description for `attend`), or "module" (a layer or function of its own), "function",
    "model", "policy", "strategy" or "experiment". where: module and name of the factory, which is imported when it is asked for."""

    name: str
    kind: str
    where: str
    made: Callable[..., Any] | None = None

    @property
    def factory(self) -> Callable[..., Any]:
        return self.made or factory_of(self.where)

    @property
    def formula(self) -> str:
        """The module's docstring: formula and paper."""
        return inspect.getdoc(inspect.getmodule(self.factory)) or ""

    @property
    def hyperparameters(self) -> inspect.Signature:
        return inspect.signature(self.factory)

    @property
    def module(self) -> str:
        return self.where.rpartition(".")[0]


@functools.cache
def factory_of(where: str) -> Callable[..., Any]:
    module, _, name = where.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


_added: dict[str, Entry] = {}  # what users registered
_described: dict[str, Mechanism] = {}


def register(name: str, kind: str = "mechanism") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: put a factory of descriptions (or, with kind="module", a class or function) into the catalogue under `name`. A class of
    layers takes `device=` and `dtype=` from then on, and has `reset_parameters()`."""

    def put(factory: Callable[..., Any]) -> Callable[..., Any]:
        if kind == "module" and inspect.isclass(factory):
            from .making import placeable  # with PyTorch, which a class of layers has imported

            placeable(factory)
        where = f"{factory.__module__}.{factory.__qualname__}"
        taken = _added.get(name) or index().get(name)
        if taken is not None and taken.where != where:
            raise RegardError(f"the name {name!r} is taken by {taken.where}; choose another for {where}")
        if name not in index():
            _added[name] = Entry(name, kind, where, factory)
            _described.pop(name, None)
        return factory

    return put


@functools.cache
def index() -> dict[str, Entry]:
    """The library's own systems, read off the sources of the zoo without importing them."""
    found: dict[str, Entry] = {}
    families = [folder for folder in resources.files("regard").joinpath("zoo").iterdir() if folder.is_dir()]
    for family, file in ((folder.name, file) for folder in families for file in folder.iterdir() if file.name.endswith(".py")):
        module = f"regard.zoo.{family}.{file.name.removesuffix('.py')}"
        for name, kind, factory in REGISTERED.findall(file.read_text(encoding="utf-8")):
            found[name] = Entry(name, kind or "mechanism", f"{module}.{factory}")
    return found


def entries() -> dict[str, Entry]:
    """Everything there is: the library's own systems and those that users registered."""
    return {**index(), **_added}


def names(kind: str | None = "mechanism") -> list[str]:
    """Names that `attend` and `regard.nn.Attention` take; kind="module" for the others, None for all."""
    return sorted(name for name, entry in entries().items() if kind in (None, entry.kind))


def entry(name: str) -> Entry:
    """The entry of a name; RegardError with the nearest names if there is none."""
    found = _added.get(name) or index().get(name)
    if found is None:
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
