"""Counts, first values, refusals and training-time parts of the mixers of patches."""

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.nn.images.patch_net import DropPath, depth_rates, fan_out_values, small_values
from regard.nn.selective_scan import SelectiveScan
from regard.zoo.vision.activator import ActivatorUnit, ActivatorViT
from regard.zoo.vision.convit import GPSA, ConViT, conv_to_gpsa
from regard.zoo.vision.mambaout import GatedCNNBlock, MambaOut, is_long_sequence, mambaout, needs_memory
from regard.zoo.vision.ninformer import MixerGatingUnit, NiNformer
from regard.zoo.vision.van_lka import LKA, VAN, LKAAttention, VANBlock, van


def size(layer):
    return sum(p.numel() for p in layer.parameters())


def test_parameter_counts_of_activator_convit_mambaout_and_van_lka():
    c, h = 6, 10
    assert size(ActivatorUnit(c, h)) == 3 * c * h + 4 * h + c
    assert size(LKA(32)) == 32 * 74 + 32**2 + 3 * 32
    with torch.device("meta"):
        for name, millions in {"b0": 4.1, "b1": 13.9, "b2": 26.6, "b3": 44.8, "b4": 60.3, "b5": 90.0, "b6": 200.0}.items():
            assert abs(size(van(name)) / 1e6 / millions - 1) < 0.01
        for name, millions in {"femto": 7.3, "kobe": 9.1, "tiny": 26.5, "small": 48.5, "base": 84.8}.items():
            assert abs(size(mambaout(name)) / 1e6 / millions - 1) < 0.01
        assert abs(size(ConViT(4)) / 5.7e6 - 1) < 0.01 and abs(size(ConViT(9)) / 27.8e6 - 1) < 0.01


def test_mambaout_of_long_sequences_and_tasks():
    assert is_long_sequence(4000, 384) and not is_long_sequence(196, 384) and not is_long_sequence(4000, 768)
    assert [needs_memory(t) for t in ("classification", "detection", "segmentation", "generation")] == [False, True, True, True]
    assert not needs_memory("detection", dim=768) and needs_memory("generation", dim=768)


def test_first_values_of_convit_and_van_lka():
    torch.manual_seed(0)
    conv, linear, plain = nn.Conv2d(64, 64, 3, groups=4), nn.Linear(256, 128), nn.Conv2d(64, 64, 3)
    for layer in (conv, linear):
        fan_out_values(layer)
    small_values(plain)
    assert float(conv.weight.std()) == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.05) and float(conv.bias.abs().max()) == 0
    assert float(linear.weight.std()) == pytest.approx(0.02, rel=0.05) and float(plain.weight.std()) == pytest.approx(0.02, rel=0.05)
    block = VANBlock(4, scale=0.3)
    assert float(block.scale1.min()) == float(block.scale2.max()) == pytest.approx(0.3)
    scan = SelectiveScan(32, ways=2, state=4)
    steps = torch.nn.functional.softplus(scan.bias)
    assert float(steps.min()) >= 1e-3 * 0.999 and float(steps.max()) <= 0.1001 and scan.step.shape == (2, 32, 2)
    assert torch.allclose(scan.log_a.exp(), torch.arange(1.0, 5).expand(2, 32, 4)) and float(scan.skip.min()) == 1
    gpsa = GPSA(20, 5, locality=2.0)  # four heads on a 2 x 2 grid, the fifth like other weights
    assert gpsa.position.weight[:4].tolist() == [[-2, -2, -2], [-2, 2, -2], [2, -2, -2], [2, 2, -2]] and float(gpsa.gate.min()) == 1
    assert 0 < float(gpsa.position.weight[4].abs().max()) < 0.3
    assert not torch.equal(GPSA(20, 5, local_init=False).v.weight, torch.eye(20))


def test_paths_are_dropped_a_sample_at_a_time():
    assert [round(r, 6) for rates in depth_rates(0.3, (1, 3)) for r in rates] == [0, 0.1, 0.2, 0.3]
    torch.manual_seed(0)
    drop, x = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    out = drop(x).flatten(1)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3]) and (out.std(1) == 0).all()
    assert float((out[:, 0] == 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


def test_dropout_reaches_activator_convit_mambaout_ninformer_and_van_lka():
    torch.manual_seed(0)
    nets = [NiNformer(16, 16, 1, 0.5, side=8), ActivatorViT(16, 16, 1, 0.5), VAN((8,), (2,), (2,), drop_path=0.5)]
    nets += [MambaOut((8,), (2,), drop_path=0.5), ConViT(1, 8, 2, 1, side=8, patch=4, dropout=0.5)]
    for net in nets:
        x = torch.randn(4, 3, 8, 8)
        net.train()
        assert not torch.equal(net(x), net(x)), type(net)
        net.eval()
        assert torch.equal(net(x), net(x))
    x, gpsa = torch.randn(2, 9, 8), GPSA(8, 4, dropout=0.5).train()
    assert not torch.equal(gpsa(x), gpsa(x))


def test_convit_from_convolutions_of_few_ranks():
    with pytest.raises(RegardError, match="rank above 2"):
        conv_to_gpsa(nn.Conv2d(18, 18, 3, padding=1))
    conv = nn.Conv2d(9, 9, 3, padding=1, bias=False)
    conv.weight.data = torch.einsum("ot,it->oit", torch.randn(9, 9), torch.randn(9, 9)).unflatten(-1, (3, 3)).contiguous()
    assert float(conv_to_gpsa(conv).out.bias.detach().abs().max()) == 0


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: LKA(4, 22, 3), id="van-lka"),
        pytest.param(lambda: VAN((4, 8), (1,), (2, 2)), id="van-lka"),
        pytest.param(lambda: van("b9"), id="van-lka"),
        pytest.param(lambda: GatedCNNBlock(8, conv_ratio=0.0), id="mambaout"),
        pytest.param(lambda: GatedCNNBlock(8, kernel=4), id="mambaout"),
        pytest.param(lambda: MambaOut((4, 8), (1,)), id="mambaout"),
        pytest.param(lambda: mambaout("huge"), id="mambaout"),
        pytest.param(lambda: needs_memory("captioning"), id="mambaout"),
        pytest.param(lambda: GPSA(10, 4), id="convit"),
        pytest.param(lambda: ConViT(4, 8, 2, 2, side=8, patch=4), id="convit"),
        pytest.param(lambda: ConViT(4, 8, 2, 1, side=9, patch=4), id="convit"),
        pytest.param(lambda: ConViT(4, 8, 2, 1, side=8, patch=4)(torch.randn(1, 3, 8, 12)), id="convit"),
        pytest.param(lambda: GPSA(8, 4)(torch.randn(1, 6, 8)), id="convit"),
        pytest.param(lambda: GPSA(8, 4)(torch.randn(1, 6, 8), (2, 4)), id="convit"),
        pytest.param(lambda: conv_to_gpsa(nn.Conv2d(4, 8, 3)), id="convit"),
        pytest.param(lambda: conv_to_gpsa(nn.Conv2d(8, 8, 3)), id="convit"),
        pytest.param(lambda: conv_to_gpsa(nn.Conv2d(9, 9, 3, stride=2)), id="convit"),
        lambda: DropPath(1.0),
        pytest.param(lambda: NiNformer(8, 8, 1, side=8)(torch.randn(1, 3, 12, 12)), id="ninformer"),
        pytest.param(lambda: LKAAttention(4)(torch.randn(1, 5, 6, 6)), id="van-lka"),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()


def test_ninformer_widths_and_epsilons():
    unit = MixerGatingUnit(6, 5)
    assert [unit.mixer.token_mlp[0].out_features, unit.mixer.channel_mlp[0].out_features] == [12, 12]
    assert (
        unit.mixer.token_norm.eps == unit.mixer.channel_norm.eps == 1e-5
        and MixerGatingUnit(6, 5, 7, 9).mixer.token_mlp[0].out_features == 7
    )
