"""Hyperparameters default to the papers', and change only on purpose (CONTRIBUTING.md, "What may change"): all defaults and named numbers of
the rows' modules stand in defaults.json. Where one is to change, so does that file: python tests/zoo/test_zoo_defaults.py"""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest

from regard.catalog.registry import entries

TABLE = Path(__file__).with_name("defaults.json")
WRITTEN = json.loads(TABLE.read_text()) if TABLE.exists() else {}
MADE_BY_DATACLASS = ("__init__", "__eq__", "__repr__", "__setattr__", "__delattr__", "__hash__", "__replace__")


def said(value):
    """A default as text that is the same in every process: functions and types by name."""
    return value.__qualname__ if inspect.isroutine(value) or inspect.isclass(value) else repr(value)


def functions(name, thing):
    """What can be called of a thing of the module, by name: itself, or a class's fields and methods."""
    if not inspect.isclass(thing):
        return [(name, thing)]
    own = [(f"{name}.{method}", f) for method, f in vars(thing).items() if inspect.isfunction(f)]
    if dataclasses.is_dataclass(thing):
        return [(name, thing), *((called, f) for called, f in own if not called.endswith(MADE_BY_DATACLASS))]
    return own


def defaults(slug):
    """function -> parameter -> its default, of all that a row's module defines; "" -> its named numbers."""
    module = importlib.import_module(entries()[slug].module)
    numbers = {
        name: x for name, x in vars(module).items() if name.isupper() and name != "TYPE_CHECKING" and isinstance(x, (int, float, tuple))
    }
    found = {"": {name: said(value) for name, value in numbers.items()}}
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__ or not callable(thing):
            continue
        for called, function in functions(name, thing):
            parameters = inspect.signature(function).parameters.values()
            found[called] = {p.name: said(p.default) for p in parameters if p.default is not p.empty}
    return {called: own for called, own in found.items() if own}


@pytest.mark.parametrize("slug", sorted(entries()))
def test_defaults_are_those_that_are_written_down(slug):
    assert defaults(slug) == WRITTEN[slug]


if __name__ == "__main__":
    rows = (f"{json.dumps(slug)}: {json.dumps(defaults(slug), sort_keys=True)}" for slug in sorted(entries()))
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
