"""One home per row: found from the slug, imported alone, its checks beside it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard.lab.verification import home

ROOT = Path(regard.__file__).parent
WORKING = regard.records(status="works")

# A row's file imports no other row's, except where the paper itself builds on that row.
BUILDS_ON = {
    ("adasplash", "entmax"): "AdaSplash is a faster computation of entmax",
    ("attentive-survey", "entmax"): "one of the survey's distributions",
    ("attentive-survey", "sparsemax"): "one of the survey's distributions",
    ("entmax", "sparsemax"): "entmax generalises sparsemax, its case alpha = 2",
    ("lalte", "deltanet"): "the paper's layers are gated DeltaNet with learned eviction",
    ("lightning-attention", "lightning-attention-2"): "two versions of one recurrence, which stands with the second",
    ("transnormerllm", "lightning-attention-2"): "TransNormerLLM runs on Lightning Attention",
    ("transnormerllm", "lightning-attention"): "the same released layers, with the same slopes",
    ("minimax-01", "lightning-attention-2"): "MiniMax-01's linear layers are Lightning Attention",
    ("minimax-m1", "minimax-01"): "M1 trains MiniMax-01's model",
    ("minicpm-sala", "lightning-attention-2"): "SALA's linear layers are Lightning Attention",
    ("nha", "gsa"): "native hybrid attention is gated slots with a window",
}


def files(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).glob("*/*.py")) if path.name != "__init__.py" and path.parent.name != "shared"]


def slug_of(path: Path) -> str:
    return path.stem.replace("_", "-")


def run(code: str) -> object:
    script = f"import json, sys, regard\n{code}"
    return json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


LOADED = "sorted(m for m in sys.modules if m.startswith('regard.zoo.') and m.count('.') == 3)"


def test_every_working_row_has_its_two_files_and_no_file_is_another_s():
    rows = {f"{record.family}/{record.slug.replace('-', '_')}" for record in WORKING}
    found = {folder: {f"{path.parent.name}/{path.stem}" for path in files(folder)} for folder in ("zoo", "lab/checks")}
    assert found["zoo"] == rows | {"softmax/softmax"}
    assert found["lab/checks"] == rows


def test_a_file_registers_its_own_slug_alone():
    for path in files("zoo"):
        assert re.findall(r'^@register\("([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE) == [slug_of(path)], path


def test_a_file_of_checks_checks_its_own_slug_alone():
    for path in files("lab/checks"):
        slugs = set(re.findall(r'^@check\(\s*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE))
        assert slugs == {slug_of(path)}, path


def test_rows_import_no_other_rows():
    found = set()
    for path in files("zoo"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.ImportFrom) or not node.level, f"{path}: expected absolute imports"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regard.zoo."):
                found.add((slug_of(path), (node.module or "").rsplit(".", 1)[1].replace("_", "-")))
    assert found == set(BUILDS_ON)


def test_asking_for_a_name_imports_its_file_alone():
    assert run(f"regard.get('softpick'); print(json.dumps({LOADED}))") == ["regard.zoo.softmax.softpick"]


def test_listing_imports_no_row():
    assert run(f"regard.names(None), regard.records(), regard.nn, regard.search, regard.parallel; print(json.dumps({LOADED}))") == []


def test_each_row_loads_itself_and_what_it_builds_on():
    code = f"""
from regard.catalog import entry
out, before = {{}}, set()
for name in regard.names(None):
    entry(name).factory
    now = set({LOADED})
    out[name], before = sorted(now - before), now
print(json.dumps(out))"""
    for name, loaded in run(code).items():  # type: ignore[attr-defined]
        allowed = {name} | {other for one, other in BUILDS_ON if one == name}
        allowed |= {other for one, other in BUILDS_ON if one in allowed} | {"softmax"}  # the baseline, which adapt names to transformers
        assert {module.rsplit(".", 1)[1].replace("_", "-") for module in loaded} <= allowed, name


def test_verifying_a_row_imports_its_checks_alone():
    code = "from regard.lab import checks_of\nassert checks_of('softpick')\n"
    code += "print(json.dumps(sorted(m for m in sys.modules if m.startswith('regard.lab.checks.') and m.count('.') == 4 and '.shared' not in m)))"
    assert run(code) == ["regard.lab.checks.softmax.softpick"]


@pytest.mark.parametrize("record", WORKING, ids=lambda record: record.slug)
def test_the_index_says_what_the_file_holds(record):
    found = regard.catalog.entry(record.slug)
    assert f"{found.factory.__module__}.{found.factory.__qualname__}" == found.where == record.entry
    assert home(record.slug) == f"regard.lab.checks.{record.family}.{record.slug.replace('-', '_')}"


@pytest.mark.parametrize("package", ["nn", "search", "parallel", "interpret", "lab.experiments"])
def test_public_names_of_rows_load_when_asked_for(package):
    import importlib

    module = importlib.import_module(f"regard.{package}")
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        module.Nothing


def test_the_card_says_where_a_row_lives():
    from regard.catalog.cards import card

    text = card("moba")
    assert "regard/zoo/sparse/moba.py" in text and "regard/lab/checks/sparse/moba.py" in text
    planned = regard.records(status="planned")[0]
    assert f"regard/zoo/{planned.family}/" in card(planned.slug)


def test_a_user_s_name_is_taken_once_and_found_at_once():
    made = []

    @regard.register("my-own-softmax")
    def own() -> regard.Weighted:
        made.append(1)
        return regard.Weighted()

    try:
        assert regard.get("my-own-softmax") == regard.Weighted() and made and "my-own-softmax" in regard.names()
        with pytest.raises(regard.RegardError, match="is taken by"):
            regard.register("my-own-softmax")(lambda: None)
    finally:
        regard.catalog.registry._added.pop("my-own-softmax")
