"""Longer runs: every row's checks, and a comparison of several mechanisms."""

from __future__ import annotations

import pytest

from regard.lab import verify
from regard.lab.compare import Config, compare
from regard.lab.compare.statistics import curve, measure


@pytest.mark.slow
def test_every_working_row_verifies():
    failed = [(record.slug, result.claim, result.verdict) for record, results in verify() for result in results if not result.passed]
    assert not failed


@pytest.mark.slow
def test_default_comparison_learns(tmp_path):
    report, finished = compare(Config(("softmax", "softpick", "deltanet"), minutes=3, out=tmp_path))
    assert finished
    for one in report["mechanisms"].values():
        assert measure(one, "language", "bits", "1").mean < 4
    assert curve(report["mechanisms"]["softmax"], "recall", "accuracy")[0][1].mean > 0.9
