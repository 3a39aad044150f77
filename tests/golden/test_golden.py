"""Every configuration of official code that the vectors hold, by regard's named API: values, gradients, full pass and step."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from golden import vectors

from regard import RegardError

HERE = pathlib.Path(__file__).parent
ADAPTERS = sorted(path for family in HERE.iterdir() if family.is_dir() for path in family.glob("*.py"))


def adapter(path: pathlib.Path) -> Any:
    return importlib.import_module(f"golden.{path.parent.name}.{path.stem}")


def slug_of(path: pathlib.Path) -> str:
    return path.stem.replace("_", "-")


def functions(path: pathlib.Path, mark: str) -> Iterator[tuple[str, Any]]:
    for name, function in vars(adapter(path)).items():
        if hasattr(function, mark) and function.__module__ == adapter(path).__name__:
            yield name, function


def runs() -> Iterator[Any]:
    for path in ADAPTERS:
        for name, function in functions(path, "runs"):
            configs, dtypes, float32 = function.runs
            for config in configs:
                for dtype in dtypes:
                    label = f"{slug_of(path)}-{name}-{config}-{str(dtype).removeprefix('torch.')}"
                    yield pytest.param(slug_of(path), function, config, dtype, float32, id=label)


def refusals() -> Iterator[Any]:
    for path in ADAPTERS:
        for name, function in functions(path, "refused"):
            configs, why = function.refused
            for config in configs:
                yield pytest.param(slug_of(path), function, config, why, id=f"{slug_of(path)}-{name}-{config}")


@pytest.mark.parametrize(("slug", "function", "config", "dtype", "float32"), runs())
def test_equals_official_code(slug: str, function: vectors.Adapter, config: str, dtype: torch.dtype, float32: float | None) -> None:
    function(vectors.Vectors(slug, config, dtype, float32))


@pytest.mark.parametrize(("slug", "function", "config", "why"), refusals())
def test_refuses(slug: str, function: vectors.Adapter, config: str, why: str) -> None:
    assert why
    with pytest.raises(RegardError):
        function(vectors.Vectors(slug, config, torch.float64))


@pytest.mark.parametrize("path", ADAPTERS, ids=slug_of)
def test_no_configuration_is_left_out(path: pathlib.Path) -> None:
    named = {config for mark in ("runs", "refused") for _, function in functions(path, mark) for config in getattr(function, mark)[0]}
    assert named >= vectors.configs(slug_of(path))
