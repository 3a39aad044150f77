"""Weights and activations rounded together: levels by hand, ranges from batches, outliers make it dear."""

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.lab.quantisation import RoundedInput, quantised, quantised_throughout


def test_levels_by_hand():
    linear = nn.Linear(1, 1, bias=False)
    nn.init.ones_(linear.weight)
    layer = RoundedInput(linear, 2)
    layer.watch(torch.tensor([-1.0, 2.0]), None)
    x = torch.tensor([[-3.0], [-1.0], [-0.4], [0.4], [0.6], [1.6], [5.0]])
    assert layer(x).flatten().tolist() == [-1, -1, 0, 0, 1, 2, 2]  # steps of (2 - -1) / 3
    layer.watch(torch.tensor([-2.0, 1.0]), None)
    assert (float(layer.low), float(layer.high)) == (-2, 2)
    moving = RoundedInput(linear, 8)
    moving.watch(torch.tensor([-1.0, 2.0]), 0.9)
    moving.watch(torch.tensor([0.5, 4.0]), 0.9)
    assert (float(moving.low), float(moving.high)) == pytest.approx((-0.9, 2.2))


def test_outliers_make_it_dear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    batches = [torch.randn(32, 8) for _ in range(4)]
    spiky = [x.clone() for x in batches]
    for x in spiky:
        x[0, 0] = 500.0

    def error(given, **options):
        small = quantised_throughout(model, given, momentum=None, **options)
        assert isinstance(small[0], RoundedInput) and isinstance(model[0], nn.Linear)
        return float((small(batches[0]) - model(batches[0])).square().mean().sqrt())

    plain = float((quantised(model, 8)(batches[0]) - model(batches[0])).square().mean().sqrt())
    assert error(batches, activation_bits=16) == pytest.approx(plain, rel=0.05)
    assert 1.05 * plain < error(batches) < 0.03 and error(spiky) > 5 * error(batches)
    assert error(batches, activation_bits=4) > 4 * error(batches)


def test_what_is_wrong_is_said():
    model = nn.Sequential(nn.Linear(2, 2))
    for given, options, message in (([], {}, "0 batches"), ([torch.zeros(1, 2)], {"activation_bits": 1}, "bits=1")):
        with pytest.raises(RegardError, match=message):
            quantised_throughout(model, given, **options)
    assert isinstance(quantised_throughout(nn.Linear(2, 2), [torch.ones(1, 2)]), RoundedInput)
    seen = []
    quantised_throughout(model, [torch.ones(1, 2)], run=lambda net, batch: seen.append(net(batch)))
    assert len(seen) == 1
