"""What the checks of normgrad do not hold: bad input, other shapes, frozen models."""

import pytest
import torch
from torch import nn

import regard
from regard.interpret import combine, meta_saliency, saliency


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 5, 3, padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )


def test_frozen_models_and_resized_maps():
    model, x = net(), torch.randn(2, 3, 7, 9)
    own = saliency(model, x, 1, "1")
    model.requires_grad_(False)
    torch.testing.assert_close(saliency(model, x, lambda out: out[:, 1], model[1]), own)
    assert saliency(model, x, 1, "0", resize=True).shape == (2, 1, 7, 9) and saliency(model, x, 1, "0", resize=(3, 5)).shape == (2, 1, 3, 5)
    assert all(p.grad is None for p in model.parameters()) and not model[0]._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(saliency(model, x, 1, "1"), own)
    before = [p.clone() for p in model.parameters()]
    meta_saliency(lambda: saliency(model, x, 1, "1"), model, x, 1, lr=1.0)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, model.parameters()))


def test_decoders_give_maps_of_tokens():
    model, ids = regard.nn.Decoder(vocab=9, dim=16, layers=2, heads=4), torch.randint(9, (2, 5))
    for layer in ("blocks.0.mixer.q", "blocks.1.mlp.down", "blocks.1"):
        found = saliency(model, ids, lambda out: out[:, 2, 3], layer)
        assert found.shape == (2, 5) and not found[:, 3:].any() and found[:, 2].all()  # nothing behind token 2 has a part in it


def test_bad_input_is_refused():
    model, x = net(), torch.randn(2, 3, 7, 9)
    for args, options, message in (
        ((1, "7"), {}, "layer"),
        ((1, nn.Linear(2, 2)), {}, "layer"),
        ((1, "0"), {"rule": "cam"}, "rule"),
        ((4, "0"), {}, "target"),
        ((1, "1"), {"rule": "true_layer"}, "nn.Linear"),
        ((1, "2"), {"rule": "true_layer"}, "nn.Conv2d"),
        ((lambda out: torch.ones(2, requires_grad=True), "0"), {}, "does not depend"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            saliency(model, x, *args, **options)
    with pytest.raises(regard.RegardError, match="expected"):
        combine([x[:, :1]], mode="max")
    for weights in ([1, 2], [-1], [0], "accuracy"):
        with pytest.raises(regard.RegardError, match="weights"):
            combine([x[:, :1]], weights)
    even = combine([torch.ones(1, 1, 2, 2), torch.rand(1, 1, 2, 2)])
    assert bool(even.isfinite().all())
