"""What linear rows have beside their mechanism: how a power focuses, norms that let go of LayerNorm."""

import copy

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.zoo.linear.flatten import focus_gap
from regard.zoo.linear.slab import PRepBN, convert_norms


def test_powers_tell_directions_apart():
    gaps = [focus_gap(p) for p in (1.0, 2.0, 3.0)]
    assert gaps[2] > 3 * gaps[0] and gaps[0] < gaps[1] < gaps[2]
    assert gaps[0] == pytest.approx(0.041, abs=0.01) and gaps[2] == pytest.approx(0.203, abs=0.03)


def test_norms_become_affine_maps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)).double()
    with torch.no_grad():
        for part in (net[0], net[2]):
            part.weight.uniform_(0.5, 2)
            part.bias.normal_()
    x, before = torch.randn(32, 5, 6, dtype=torch.float64), copy.deepcopy(net)
    with convert_norms(net, 3) as done:
        assert done.names == ("0", "2") and isinstance(net[0], PRepBN)
        torch.testing.assert_close(net(x), before(x))  # step 0
        assert not torch.allclose(net(x), before(x))
        for _ in range(60):
            net(x)
        assert net[0].share == 0
        flat = x.flatten(0, 1)
        own = (x - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt() * before[0].weight + before[0].bias + x
        torch.testing.assert_close(net.train()[0](x), own)
        net.eval()
        torch.testing.assert_close(net[0].fuse(net[1])(x), net[1](net[0](x)))
    torch.testing.assert_close(net(x), before(x))
    with pytest.raises(RegardError, match="one dimension"):
        convert_norms(nn.Sequential(nn.LayerNorm((2, 3))), 3)
