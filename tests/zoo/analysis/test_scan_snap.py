"""Sizes that do not fit, and the plot."""

import pytest

import regard
from regard.zoo.analysis.scan_snap import scan_and_snap, scan_data


def test_bad_sizes_are_refused():
    with pytest.raises(regard.RegardError, match="low"):
        scan_data(low=0.0)
    with pytest.raises(regard.RegardError, match="length"):
        scan_and_snap(scan_data(), length=1)
    assert "<svg" in scan_and_snap(scan_data(), length=8, steps=4, batch=4, every=2).plot()
