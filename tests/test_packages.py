"""Sub-packages of regard are there after `import regard`, and loaded when first used."""

import subprocess
import sys

NAMES = ("adapt", "algebra", "catalog", "engine", "interpret", "lab", "models", "nn", "parallel", "search", "taps", "tasks", "zoo")


def test_a_bare_import_is_enough():
    code = f"import sys, regard; print([n for n in {NAMES} if 'regard.' + n in sys.modules]); print([getattr(regard, n).__name__ for n in {NAMES}])"
    before, after = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert before == "[]"
    assert after == str([f"regard.{name}" for name in NAMES])
