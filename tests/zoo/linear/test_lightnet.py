"""LightNet beyond its checks: mixing along a sequence, outputs at every place, grids that do not fit."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError
from regard.zoo.linear.lightnet import AxisMixing, LightNet, lightnet, relative_cosines

F64 = torch.float64


def test_mixing_along_a_sequence_reads_no_later_token() -> None:
    torch.manual_seed(0)
    causal, both, x = AxisMixing(4, 1, 2, causal=True).double(), AxisMixing(4, 1, 2).double(), torch.randn(2, 9, 4, dtype=F64)
    other = x.clone()
    other[:, 5:] += torch.randn(2, 4, 4, dtype=F64)
    torch.testing.assert_close(causal(x, (9,))[:, :5], causal(other, (9,))[:, :5])
    assert not torch.allclose(both(x, (9,))[:, :5], both(other, (9,))[:, :5])
    with pytest.raises(RegardError, match="axes=2"):
        AxisMixing(4, 2, causal=True)
    for wrong in ((8,), (3, 3)):
        with pytest.raises(RegardError, match="expected 1 sizes whose product is the length 9"):
            causal(x, wrong)


def test_a_mixing_of_three_axes_is_a_sum_of_one_along_each() -> None:
    torch.manual_seed(0)
    layer, x = AxisMixing(4, 3).double(), torch.randn(2, 24, 4, dtype=F64)
    plane = x.view(2, 2, 3, 4, 4)
    want = plane.clone()
    for b in range(2):
        for i in range(2):
            for j in range(3):
                want[b, i, j] += layer.mixers[2](plane[b, i, j][None])[0]
            for m in range(4):
                want[b, i, :, m] += layer.mixers[1](plane[b, i, :, m][None])[0]
        for j in range(3):
            for m in range(4):
                want[b, :, j, m] += layer.mixers[0](plane[b, :, j, m][None])[0]
    torch.testing.assert_close(layer(x, (2, 3, 4)).view_as(plane), want)


def test_outputs_at_every_place_have_the_pooled_one_as_their_mean() -> None:
    torch.manual_seed(0)
    model, x = LightNet(3, 5, (3, 4), dim=16, layers=1).double(), torch.randn(2, 12, 3, dtype=F64)
    every = LightNet(3, 5, (3, 4), dim=16, layers=1, pooled=False).double()
    every.load_state_dict(model.state_dict())
    assert every(x).shape == (2, 12, 5)
    torch.testing.assert_close(every(x).mean(1), model(x))
    assert {norm.eps for norm in model.modules() if isinstance(norm, torch.nn.RMSNorm) and norm is not model.mixers[0].merge_norm} == {1e-6}


def test_cosines_of_three_axes_tell_places_in_the_order_of_rows() -> None:
    torch.manual_seed(0)
    x, theta = torch.ones(1, 1, 24, 2, dtype=F64), torch.rand(1, 2, 3, dtype=F64)
    found = relative_cosines(x, torch.arange(24), theta, (2, 3, 4))[0, 0]
    for at in range(24):
        place = torch.tensor([at // 12, at // 4 % 3, at % 4], dtype=F64)
        angle = theta[0] @ place
        torch.testing.assert_close(found[at], torch.cat((angle.cos(), angle.sin())))


def test_scores_scaled_or_not() -> None:
    import regard

    q, f, v = (torch.randn(1, 2, 6, 4, dtype=F64) for _ in range(3))
    plain = regard.attend(q, f, v, lightnet(scaled=False), mask=regard.Causal())
    torch.testing.assert_close(plain, 2 * regard.attend(q, f, v, lightnet(), mask=regard.Causal()))
