"""Verify: verdicts, controls, and the shape of its JSON."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

import regard.lab.verification as verification
from regard.cli import app
from regard.lab.verification import Check, judge, run


def make(measured, control, threshold=1.0, side="below"):
    return Check("x", "claim", threshold, side, "the baseline", lambda: (measured, control))


@pytest.mark.parametrize(
    "measured, control, side, passed",
    [
        (0.5, 2.0, "below", True),
        (0.5, 0.6, "below", False),
        (2.0, 3.0, "below", False),
        (2.0, 0.5, "above", True),
        (2.0, 3.0, "above", False),
        (math.nan, 2.0, "below", False),
        (0.5, math.nan, "below", False),
        (0.5, math.inf, "below", False),
    ],
)
def test_verdicts(measured, control, side, passed):
    assert (judge(make(measured, control, side=side), measured, control) == "pass") is passed


def test_an_exception_is_a_failure():
    def broken():
        raise ZeroDivisionError("no")

    result = run(Check("x", "claim", 1.0, "below", "none", broken))
    assert not result.passed and "ZeroDivisionError" in result.verdict


def test_json(tmp_path):
    file = tmp_path / "v.json"
    done = CliRunner().invoke(app, ["verify", "relu", "cog-attention", "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert set(found) == {"rows", "summary"} and found["summary"]["works"] == 2 and found["summary"]["failed"] == 0
    assert set(found["rows"][0]) == {"id", "slug", "family", "status", "checks"}
    assert set(found["rows"][0]["checks"][0]) == {"claim", "measured", "threshold", "control", "verdict"}


def test_a_passing_control_fails_the_command(monkeypatch):
    monkeypatch.setattr(verification, "checks_of", lambda slug: [make(0.5, 0.5)])
    done = CliRunner().invoke(app, ["verify", "relu"])
    assert done.exit_code == 1 and "the control passes too" in done.output


def test_list_json():
    done = CliRunner().invoke(app, ["list", "--json"])
    found = json.loads(done.output)
    assert len(found) == 307 and {"id", "slug", "title", "year", "family", "kind", "status", "entry", "check"} <= set(found[0])
