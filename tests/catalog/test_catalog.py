"""The catalogue: 307 records, names, and honest statuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

import regard
from regard.catalog import entry, register
from regard.lab import checks_of


def test_records():
    found = regard.records()
    assert len(found) == 307 and len({record.slug for record in found}) == 307 and [record.id for record in found] == list(range(307))
    assert all(record.title and record.math and record.check for record in found)
    working = {record.slug for record in found if record.status == "works"}
    assert working == set(regard.names(None)) - {"softmax"}


def test_working_rows_are_importable_documented_and_checked():
    import importlib

    for record in regard.records(status="works"):
        module, _, name = record.entry.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, record.slug
        assert entry(record.slug).formula and checks_of(record.slug), record.slug


def test_names_are_taken_once():
    with pytest.raises(regard.RegardError, match="is taken by"):
        register("softmax")(lambda: None)


def test_import_is_light():
    """Nothing optional is imported, and regard adds little to torch's own import."""
    script = (
        "import torch, time, sys; a = time.perf_counter(); import regard; b = time.perf_counter(); "
        "bad = [m for m in ('triton', 'transformers', 'matplotlib', 'typer', 'rich', 'sklearn') if m in sys.modules]; print(b - a, bad)"
    )
    fastest = 9.0
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        seconds, _, bad = out.partition(" ")
        assert bad.strip() == "[]"
        fastest = min(fastest, float(seconds))
    assert fastest < 0.3


@pytest.mark.parametrize("name", regard.names(None))
def test_every_system_has_a_card(name):
    from regard.lab.card import card

    text = card(name, next((r for r in regard.records() if r.slug == name), None))
    assert name in text and "\n" in text
