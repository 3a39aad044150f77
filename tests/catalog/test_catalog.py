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
    """Beside torch, asking for `regard.attend` loads its own algebra, engine and catalogue, and hardly anything else: no compiler, no host, no layer."""
    script = (
        "import torch, sys; before = set(sys.modules); import regard; regard.attend; print(' '.join(sorted(set(sys.modules) - before)))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    own = [name for name in loaded if name.partition(".")[0] == "regard"]
    assert set(loaded) - set(own) <= {"shlex", "subprocess", "_posixsubprocess"}
    assert not [name for name in own if name.split(".")[1:2] not in ([], ["algebra"], ["engine"], ["catalog"], ["errors"], ["lazy"])]
    assert len(own) < 90


@pytest.mark.parametrize("name", regard.names(None))
def test_every_system_has_a_card(name):
    from regard.catalog.cards import card, made
    from regard.lab.card import lines

    assert made().get(name) == lines(name), "made by: python scripts/cards.py > src/regard/catalog/cards.json"
    assert "\n".join(made()[name]) in card(name) and card(name).startswith(f"{name}: ")
