"""The script for a lent GPU runs from end to end without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform; the Linux CI runs this test")


@pytest.mark.slow
def test_a_dry_run_is_complete_and_right(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_day.py"
    done = subprocess.run(
        [sys.executable, str(script), "--dry", "--minutes", "6", "--out", str(tmp_path / "day.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "day.json").read_text())
    assert len(found) == 5 and all(one["ended"] == "exit status 0" for one in found.values())
    for group in ("weighted kernels", "scan kernels"):
        assert found[group]["right"] == found[group]["of"] > 0
