"""What taps say they will keep is what they keep; reductions that skip unseen keys give what whole maps give."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError, models, taps
from regard.nn import Attention, Decoder
from regard.taps import Behind, ColumnMass, Entropy, Mass, MeanDistance, Pooled, Top

SHORT = [ColumnMass(), Entropy(), MeanDistance(), Behind(1), Behind(5, "five")]


def hosts():
    return {"tiny": models.load("tiny"), "own": Decoder(vocab=256, dim=32, layers=2, heads=4, kv_heads=2).eval()}


def kept(seen):
    found = {}
    for (name, _), tensors in seen.found.items():
        for x in tensors:
            found[name] = found.get(name, 0) + sum(y.numel() * y.element_size() for y in (x if isinstance(x, tuple) else (x,)))
    return found


@pytest.mark.parametrize("host", ["tiny", "own"])
@pytest.mark.parametrize("options", [{}, {"layers": [1], "heads": [2, 3]}, {"positions": [-1, 0, 4]}])
def test_bytes_are_those_that_are_kept(host, options):
    model, ids = hosts()[host], torch.randint(97, 120, (3, 11))
    points = [
        "q",
        "k",
        "v",
        "weights",
        "logits",
        "heads",
        "out",
        "residual_in",
        "residual_mid",
        "mlp",
        "residual_out",
        ColumnMass(),
        Top(2),
        Entropy(),
    ]
    if "positions" not in options:
        points.append(Pooled(4))
    said = taps.plan(model, points, batch=3, length=11, **options)
    with torch.no_grad(), taps.read(model, points, **options) as seen:
        model(ids)
    found = kept(seen)
    assert {line.point: line.bytes for line in said.lines} == found and said.bytes == sum(found.values())
    assert said.work > 0 and "MB kept" in str(said) and said.forward > said.flops > 0


def test_only_maps_cost_operations():
    model = models.load("tiny")
    assert taps.plan(model, ["q", "k", "v", "heads", "mlp"], length=64).flops == 0
    one, all_ = (taps.plan(model, "weights", length=64, layers=layers) for layers in ([0], None))
    assert all_.flops == 4 * one.flops and all_.bytes == 4 * one.bytes == 4 * 8 * 64 * 64 * 4
    both = taps.plan(model, ["weights", "logits", ColumnMass()], length=64, layers=[0])
    assert both.flops == one.flops  # the map is made once
    long = taps.plan(model, ColumnMass(), length=4096)
    assert long.bytes == 4 * 8 * 4096 * 4 and long.work < 20 * 2**20 and 0 < long.share < 2


def test_what_cannot_be_read_cannot_be_planned():
    model = models.load("tiny")
    for points, options in (("keys", {}), ("q", {"layers": [9]}), ("q", {"positions": [12]})):
        with pytest.raises(RegardError):
            taps.plan(model, points, length=8, **options)
    with pytest.raises(RegardError, match="length=0"):
        taps.plan(model, "q", length=0)
    with pytest.raises(RegardError, match="expected a torch"):
        taps.plan(None, "q", length=4)


@pytest.mark.parametrize("host", ["tiny", "own"])
def test_reductions_of_seen_keys_are_those_of_whole_maps(host, monkeypatch):
    model, ids = hosts()[host], torch.randint(97, 120, (2, 37))
    monkeypatch.setattr("regard.taps.station.CHUNK", 500)  # several pieces
    for options in ({}, {"positions": [30, 3, -1]}, {"heads": [1]}):
        with torch.no_grad(), taps.read(model, SHORT, **options) as short, taps.read(model, [*SHORT, Mass([0])], **options) as whole:
            model(ids)
        for one in SHORT:
            for layer, x in short.items(one.name):
                assert torch.allclose(x, whole[one.name, layer], atol=1e-5), (one.name, layer, options)


def test_reductions_with_a_cache_padding_and_gradients():
    model, ids = models.load("tiny"), torch.randint(97, 120, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        past = model(ids[:, :12], use_cache=True).past_key_values
        with taps.read(model, ColumnMass()) as late, taps.read(model, "weights") as maps:
            model(ids[:, 12:], past_key_values=past)
        for layer, x in late.items("column_mass"):
            assert torch.allclose(x, maps["weights", layer].sum(2), atol=1e-5)
        with taps.read(model, ColumnMass()) as padded, taps.read(model, "weights") as maps:
            model(ids, attention_mask=mask)
        for layer, x in padded.items("column_mass"):
            assert torch.allclose(x, (maps["weights", layer] * mask[:, None, :, None]).sum(2), atol=1e-5)
    layer = Attention(16, 2)
    x = torch.randn(1, 9, 16, requires_grad=True)
    with taps.read(layer, Entropy(), graph=True) as seen:
        layer(x)
    assert torch.autograd.grad(seen["entropy", 0].sum(), x)[0].abs().max() > 0
