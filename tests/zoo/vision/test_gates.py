"""Counts, refusals and training of the gates over channels and pixels."""

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.nn.images.plane_gates import ChannelGate, SpatialGate
from regard.nn.images.planes import max_around
from regard.zoo.vision.cbam import CBAM
from regard.zoo.vision.ela import ELA, CoordinateAttention
from regard.zoo.vision.little_attention_block import LiteAttention
from regard.zoo.vision.polarized_attention import PolarizedSelfAttention
from regard.zoo.vision.ulsam import ULSAM


def size(layer):
    return sum(p.numel() for p in layer.parameters())


def test_parameter_counts_of_cbam_ela_ulsam_and_polarized_attention():
    assert size(CBAM(64, 16)) == 2 * 256 + 4 + 64 + 98 + 2
    assert size(ELA(256, "B")) == 2304 and size(ELA(256, "L")) == 14848
    assert [size(ULSAM(16, g, bare=True)) for g in (1, 2, 4)] == [32, 32, 32]
    assert size(ULSAM(16, 4)) == 32 + 16 + 4 + 2 * (16 + 4)
    assert size(PolarizedSelfAttention(64, released=True)) == 64 + 4 * 64 * 32


def test_squeeze_and_excitation_is_the_channel_gate_of_means():
    gate, x = ChannelGate(8, 2, ("avg",)), torch.randn(2, 8, 4, 5)
    first, _, last = gate.mlp
    assert torch.allclose(gate(x), x * torch.sigmoid(last(torch.relu(first(x.mean((2, 3))))))[..., None, None])


def test_running_statistics_move_by_the_papers_momentum_cbam_and_ulsam():
    gate, x = SpatialGate(), torch.randn(4, 8, 6, 6)
    seen = gate.conv(torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1))
    gate(x)
    assert torch.allclose(gate.norm.running_mean, 0.01 * seen.mean().detach(), atol=1e-6)
    layer = ULSAM(8, 2)
    layer(x)
    assert torch.allclose(layer.after[0][0].running_mean, 0.9 * layer.depthwise(x).mean((0, 2, 3)), atol=1e-6)


def test_equal_largest_values_give_their_gradient_to_the_first():
    x = torch.zeros(1, 4, 3, 3, requires_grad=True)
    gate = ChannelGate(4, 2, ("max",))
    gate.gate(x).sum().backward()
    assert float(x.grad[..., 1:, :].abs().sum()) == 0 and float(x.grad[..., 0, 0].abs().sum()) > 0


def test_root_of_squares_has_a_gradient_at_zero():
    x = torch.zeros(1, 4, 3, 3, requires_grad=True)
    ChannelGate(4, 2, ("lp",))(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: CBAM(8, 16), id="cbam"),
        pytest.param(lambda: CBAM(8, 4, pools=()), id="cbam"),
        pytest.param(lambda: CBAM(8, 4, pools=("mean",)), id="cbam"),
        pytest.param(lambda: CBAM(8, 4, order="channels"), id="cbam"),
        pytest.param(lambda: CBAM(8, 4, spatial=False, order="parallel"), id="cbam"),
        lambda: SpatialGate(4),
        pytest.param(lambda: ELA(24), id="ela"),
        pytest.param(lambda: ELA(64, "X"), id="ela"),
        pytest.param(lambda: ELA(64, kernel=4), id="ela"),
        pytest.param(lambda: ULSAM(10, 4), id="ulsam"),
        pytest.param(lambda: ULSAM(8, 4, pool=2), id="ulsam"),
        pytest.param(lambda: PolarizedSelfAttention(1), id="polarized-attention"),
        pytest.param(lambda: PolarizedSelfAttention(8, "both"), id="polarized-attention"),
        pytest.param(lambda: PolarizedSelfAttention(4, "sequential", released=True), id="polarized-attention"),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()


def test_first_values_of_ela_and_polarized_attention():
    torch.manual_seed(0)
    layer = PolarizedSelfAttention(256)
    for conv in (layer.q_plane, layer.v_plane, layer.q_channel, layer.v_channel):
        assert float(conv.weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.15)
    assert isinstance(CoordinateAttention(512).squeeze[1], nn.BatchNorm2d) and CoordinateAttention(512).squeeze[0].out_channels == 16


GATES = {
    "cbam": lambda: CBAM(16, 4),
    "cbam, pixels first": lambda: CBAM(16, 4, order="spatial-first"),
    "cbam, parallel": lambda: CBAM(16, 4, order="parallel"),
    "cbam, channels alone": lambda: CBAM(16, 4, spatial=False),
    "ela": lambda: ELA(16),
    "coordinates": lambda: CoordinateAttention(16),
    "ulsam": lambda: ULSAM(16, 4),
    "ulsam, bare": lambda: ULSAM(16, 2, bare=True, pool=5),
    "polarized-attention": lambda: PolarizedSelfAttention(16),
    "polarized-attention, sequential": lambda: PolarizedSelfAttention(16, "sequential"),
    "polarized-attention, released": lambda: PolarizedSelfAttention(16, "sequential", released=True),
    "little-attention-block": lambda: LiteAttention(16, 4),
}


@pytest.mark.parametrize("name", GATES)
def test_without_gradients_the_values_are_the_same_and_the_input_is_left_alone(name):
    torch.manual_seed(0)
    layer = GATES[name]().double()
    for p in layer.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    layer.eval()
    for shape in ((2, 16, 5, 7), (1, 16, 1, 3), (1, 16, 2, 2)):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory)
            kept, truth = x.clone(), layer(x)
            with torch.no_grad():
                assert torch.allclose(layer(x), truth, atol=1e-12) and torch.equal(x, kept)
            with torch.inference_mode():
                assert torch.allclose(layer(x), truth, atol=1e-12) and torch.equal(x, kept)
            if hasattr(layer, "gate"):
                assert torch.allclose(x * layer.gate(x), truth, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_the_largest_around_without_gradients(size):
    for shape in ((2, 3, 6, 5), (1, 2, 1, 4), (1, 1, 2, 3), (0, 2, 3, 3)):
        x = torch.randn(shape)
        truth = torch.nn.functional.max_pool2d(x, size, 1, size // 2) if len(x) else x
        assert torch.equal(max_around(x, size), truth)
        with torch.no_grad():
            assert torch.equal(max_around(x, size), truth)


def test_polarized_attention_first_values():
    torch.manual_seed(0)
    layer = PolarizedSelfAttention(256)
    assert not layer.released and layer.layout == "parallel" and isinstance(layer.norm, nn.LayerNorm)
    for conv in (layer.v_plane, layer.q_channel, layer.v_channel):
        assert float(conv.weight.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert PolarizedSelfAttention(64, "sequential", released=True).up[0].out_features == 8
