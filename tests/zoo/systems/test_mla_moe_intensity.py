"""Arithmetic intensity: bad input, halves and devices of one's own."""

import pytest

from regard import RegardError
from regard.zoo.systems.mla_moe_intensity import FeedForward, Heads, Latent, intensity, ridge


def test_devices_widths_and_bounds():
    assert ridge((10.0, 2.0)) == 5.0 and intensity(Heads(4, 4, 8), "decode", 1, 10, "float8").ratio == 2.0
    found = intensity(FeedForward(100), "prefill", 2, 5)
    assert found.ratio == 10.0 and found.seconds((1000.0, 10.0)) == 20.0 and found.bound((1000.0, 10.0)) == "memory"
    assert Latent(2, 8, 4, 4).absorption() == 4 * 2 * 4 * 8


def test_bad_input():
    for options in ({"phase": "train"}, {"batch": 0}, {"length": 0}, {"dtype": "int4"}):
        with pytest.raises(RegardError, match="expected 'decode' or 'prefill'"):
            intensity(Heads(4, 4, 8), **options)
    for device in ("tpu", (0.0, 1.0)):
        with pytest.raises(RegardError, match="expected one of a100"):
            ridge(device)
