"""Imports go one way: a layer reads only what is below it, and no files stand in a circle. Imports inside functions count."""

from __future__ import annotations

from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parent.parent


def test_contracts_of_imports_are_kept() -> None:
    """The contracts of pyproject.toml, as `make lint` reads them."""
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


def test_no_files_import_each_other() -> None:
    graph = grimp.build_graph("regard", cache_dir=None)
    reads = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert reads.get("regard.engine.door")
    TopologicalSorter(reads).prepare()  # CycleError names a circle


def test_names_of_test_files_are_their_own() -> None:
    """pytest imports test files by their bare names: two of one name cannot be collected in one run."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
