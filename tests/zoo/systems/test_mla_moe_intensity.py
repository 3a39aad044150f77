"""Arithmetic intensity: bad input, halves and devices of one's own."""

import pytest

from regard import RegardError
from regard.zoo.systems.mla_moe_intensity import FeedForward, Heads, Intensity, Latent, balanced_batch, intensity, plot, ridge, sweep


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


def pairs(length):
    return sum(i + 1 for i in range(length))


def test_prefill_counts_every_pair_under_the_mask_once():
    """Two FLOPs a product, of queries with keys and of weights with values; queries, keys, values and outputs pass once."""
    for heads in (Heads(6, 2, 8), Heads(4, 4, 5)):
        found = intensity(heads, "prefill", 3, 7, "float32")
        assert found.flops == 3 * pairs(7) * heads.heads * (2 * heads.head_dim + 2 * heads.head_dim)
        assert found.bytes == 3 * 4 * 7 * heads.head_dim * (heads.heads + heads.kv_heads + heads.kv_heads + heads.heads)
    found = intensity(Latent(3, 16, 4, 8), "prefill", 2, 5, "float8")
    assert found.flops == 2 * pairs(5) * 3 * (2 * (8 + 4) + 2 * 8)
    assert found.bytes == 2 * 5 * 3 * ((8 + 4) + (8 + 4) + 8 + 8)
    dense = intensity(FeedForward(100), "prefill", 2, 5, "float16")
    assert (dense.flops, dense.bytes) == (2 * 2 * 5 * 100, 200)


def test_sweep_and_its_widths():
    rows = sweep({"a": Heads(4, 2, 8), "b": Latent(2, 8, 4, 4)}, (1, 3), (5, 9), "float32")
    assert [(row["name"], row["batch"], row["length"]) for row in rows] == [(n, b, t) for n in "ab" for b in (1, 3) for t in (5, 9)]
    for row in rows:
        arch = Heads(4, 2, 8) if row["name"] == "a" else Latent(2, 8, 4, 4)
        one = intensity(arch, "decode", row["batch"], row["length"], "float32")
        assert (row["flops"], row["bytes"], row["ratio"]) == (one.flops, one.bytes, one.flops / one.bytes)
    bytes = [intensity(Heads(1, 1, 8), "decode", 1, 1, dtype).bytes for dtype in ("float32", "bfloat16", "float16", "float8")]
    assert bytes == [64, 32, 32, 16]
    assert Intensity(10.0, 2.0).bound((5.0, 1.0)) == "compute" and Intensity(10.0, 2.0).bound((5.1, 1.0)) == "memory"
    assert Intensity(10.0, 2.0).seconds((5.0, 4.0)) == 2.0 and Intensity(10.0, 20.0).seconds((5.0, 4.0)) == 5.0
    assert balanced_batch(FeedForward(9, 8, 3), 4) == 11


def test_plots_have_a_line_for_each_architecture_and_a_point_for_each_row():
    archs = {"heads": Heads(4, 1, 8), "moe": FeedForward(64, 8, 2)}
    rows = sweep(archs, (1, 4, 16), (32,))
    told = plot(rows, device=(100.0, 2.0))
    assert told.startswith("<svg") and ">heads<" in told and ">moe<" in told and ">ridge<" in told
    for row in rows:
        assert f"{row['ratio']:.4g} FLOP a byte" in told
    assert "50 FLOP a byte" in told and "ridge" not in plot(rows)
    several = plot(sweep(archs, (1, 4), (32, 64)), over="length")
    assert all(f">{name}, batch {batch}<" in several for name in archs for batch in (1, 4))
    for options in ({"over": "dtype"}, {"rows": []}):
        with pytest.raises(RegardError, match="expected batch or length"):
            plot(**{"rows": rows, **options})
