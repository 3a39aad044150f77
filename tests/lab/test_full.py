"""Runs at the papers' size: each runs (with few steps), and names without one are refused."""

import math

import pytest

from regard import RegardError
from regard.lab.full import FULL, full


@pytest.mark.parametrize("slug", FULL)
def test_every_run_gives_numbers(slug):
    if slug in ("active-dormant-heads", "dsf"):
        pytest.skip("its steps alone take a minute")
    lines = list(full(slug, small={"scan-snap": 200, "benefits-of-rank": 400, "attention-svm": 50}.get(slug, 2)))
    assert lines and all(isinstance(told, str) and math.isfinite(number) for told, number in lines)


def test_others_are_refused_with_those_there_are():
    with pytest.raises(RegardError, match=r"'softmax' has no run .*abrupt-icl"):
        full("softmax")
