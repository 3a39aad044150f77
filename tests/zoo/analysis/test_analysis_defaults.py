"""Hyperparameters default to the papers', and change only on purpose (CONTRIBUTING.md, "What may change"): all defaults of the rows' functions stand in
defaults.json. Where one is to change, so does that file: python tests/zoo/analysis/test_analysis_defaults.py"""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest

from regard.catalog.registry import entries

TABLE = Path(__file__).with_name("defaults.json")
SLUGS = sorted(slug for slug, entry in entries().items() if ".analysis." in entry.module)


def defaults(slug):
    """function -> parameter -> its default, of all that a row's module defines."""
    module, found = importlib.import_module(entries()[slug].module), {}
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__ or not callable(thing):
            continue
        methods = (
            [(f"{name}.{own}", f) for own, f in vars(thing).items() if inspect.isfunction(f)] if inspect.isclass(thing) else [(name, thing)]
        )
        for called, function in methods:
            if dataclasses.is_dataclass(thing) and called.endswith(("__init__", "__eq__", "__repr__", "__setattr__", "__delattr__")):
                continue
            own = {p.name: repr(p.default) for p in inspect.signature(function).parameters.values() if p.default is not p.empty}
            if own:
                found[called] = own
    return found


@pytest.mark.parametrize("slug", SLUGS)
def test_defaults_are_those_that_are_written_down(slug):
    assert defaults(slug) == json.loads(TABLE.read_text())[slug]


if __name__ == "__main__":
    TABLE.write_text(json.dumps({slug: defaults(slug) for slug in SLUGS}, indent=1, sort_keys=True) + "\n")
