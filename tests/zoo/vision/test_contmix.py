"""First values, refusals, one sample in training, and merging of OverLoCK and its blocks."""

import pytest
import torch

from regard import RegardError
from regard.nn.images.dynamic_kernels import DynamicKernels, window_bias, window_starts
from regard.nn.images.large_kernels import ChannelScale, DilatedReparam, Residual, SqueezeExcite, merged
from regard.zoo.vision.contmix import ContMix, OverLoCK, overlock

SMALL = {
    "dims": (8, 8, 8, 16),
    "depths": (1,) * 4,
    "focus": (2, 2),
    "heads": (1, 1),
    "kernels": (7, 5, 5, 5),
    "small": 3,
    "ratios": (2,) * 4,
}


def test_first_values():
    torch.manual_seed(0)
    net = OverLoCK(**SMALL, classes=3)
    assert {float(p.abs().max()) for name, p in net.named_parameters() if name.endswith((".near", ".far", "beta", "gamma"))} == {0.0}
    assert {float(p.min()) for name, p in net.named_parameters() if "scale" in name and name.endswith("weight")} == {1.0}
    assert not any("base.0" in name and "join.scale" in name for name, _ in net.named_parameters())
    assert net.base[0][11].branch[4].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert ContMix(8).windows.far.std().item() == pytest.approx(0.02, rel=0.2) and float(ContMix(8, 4).windows.far.abs().max()) == 0
    assert SqueezeExcite(8).first.out_channels == 16 and SqueezeExcite(256).first.out_channels == 32
    assert float(ChannelScale(3, 0.2).weight.max()) == pytest.approx(0.2)


def test_windows_are_shifted_inside():
    assert window_starts(7, 3).tolist() == [0, 0, 1, 2, 3, 4, 4] and window_starts(5, 5).tolist() == [0] * 5
    table = torch.arange(25.0).view(1, 5, 5)
    bias = window_bias(table, 4, 5)
    assert bias.shape == (1, 4, 5, 9) and bias[0, 0, 0].tolist() == [12, 13, 14, 17, 18, 19, 22, 23, 24]
    assert bias[0, 3, 4].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12] and bias[0, 1, 1].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


def test_small_maps_are_stretched():
    layer = DynamicKernels(8, 4)
    assert layer.working_size(7, 30) == (7, 30) and layer.working_size(3, 5) == (7, 11) and layer.working_size(5, 3) == (11, 7)
    assert layer.working_size(1, 1) == (7, 7)


def test_merging_a_net_leaves_its_outputs():
    torch.manual_seed(0)
    net, x = OverLoCK(**SMALL, classes=3).double(), torch.randn(2, 3, 48, 40, dtype=torch.float64)
    net.train()
    net.both(x)[0].sum().backward()
    before = net.eval().both(x)
    size = sum(p.numel() for p in net.parameters())
    assert merged(net) is net
    for a, b in zip(before, net.both(x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert sum(p.numel() for p in net.parameters()) < size
    assert not any(len(part.convs) for part in net.modules() if isinstance(part, DilatedReparam))


def test_drop_path_is_where_the_residual_is():
    torch.manual_seed(0)
    x, branch = torch.ones(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    for on_stream, values in ((False, {1.0, 2.0}), (True, {0.5, 2.5})):
        out = Residual(1, 0.5, on_stream, 0.5).train()(x, branch)
        assert {round(float(v), 4) for v in out.flatten()} == values
    net = OverLoCK(**SMALL, drop_path=0.7)
    rates = [part.drop.rate for part in net.modules() if isinstance(part, Residual)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.4, 0.4, 0.5, 0.5, 0.6, 0.6, 0.7, 0.7, 0.3]) or max(rates) == pytest.approx(0.7)


def test_refusals():
    x, context = torch.zeros(1, 8, 5, 5), torch.zeros(1, 4, 5, 5)
    with pytest.raises(RegardError, match="expected x and context"):
        ContMix(8, 4)(x)
    with pytest.raises(RegardError, match="expected x, context and origin"):
        ContMix(8, 4, first=False)(x, context)
    with pytest.raises(RegardError, match="context_dim=0"):
        ContMix(8)(x, context)
    with pytest.raises(RegardError, match="expected odd sizes"):
        ContMix(8, kernel=6)
    with pytest.raises(RegardError, match="small at most kernel"):
        ContMix(8, kernel=5, small=7)
    with pytest.raises(RegardError, match="multiple of 4 heads = 8"):
        ContMix(12)
    with pytest.raises(RegardError, match="expected one of 5, 7"):
        DilatedReparam(4, 3)
    with pytest.raises(RegardError, match="'xt', 't', 's', 'b'"):
        overlock("m")
    with pytest.raises(RegardError, match="expected 4 of dims"):
        OverLoCK(dims=(8, 8))
    with pytest.raises(RegardError, match="one value a channel"):
        OverLoCK(**SMALL).train()(torch.zeros(1, 3, 16, 16))


def test_gradients():
    torch.manual_seed(0)
    layer = ContMix(4, 2, kernel=5, small=3, heads=1, pool=2, ratio=1).double().eval()
    x, context = (torch.randn(1, c, 3, 4, dtype=torch.float64, requires_grad=True) for c in (4, 2))
    assert torch.autograd.gradcheck(layer, (x, context))
