"""Twins against timm's, counts, first values and refusals of Twins and LITv2."""

import pytest
import torch

from regard import RegardError
from regard.nn.images import timm_host
from regard.zoo.vision.litv2_hilo import DeformableMerging, HiLo, LITv2
from regard.zoo.vision.twins import GlobalSubsampledAttention, LocallyGroupedAttention, Twins, pair_flops, pcpvt


def size(layer):
    return sum(p.numel() for p in layer.parameters())


def renamed(key, value):
    """timm's names of a Twins as ours: queries, keys and values of window attention stand apart here."""
    for old, new in (("pos_block.", "places."), ("patch_embeds.", "patches."), ("blocks.", "stages."), (".proj.0.", ".conv.")):
        key = key.replace(old, new, 1) if key.startswith(old) or old.startswith(".") else key
    if key.startswith("patches."):
        return {key.replace("patches", "norms").replace(".norm", "") if ".norm" in key else key.replace(".proj", ""): value}
    key = key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3").replace("attn.proj", "attention.inner.out")
    key = key.replace("attn.sr", "attention.reduce").replace("attn.norm", "attention.norm")
    if "attn.qkv" in key:
        q, kv = value.split((value.shape[0] // 3, value.shape[0] // 3 * 2))
        return {key.replace("attn.qkv", "attention.inner.q"): q, key.replace("attn.qkv", "attention.inner.kv"): kv}
    return {key.replace("attn.", "attention.inner."): value}


@pytest.mark.parametrize("name", ["twins_svt_small", "twins_pcpvt_small"])
def test_twins_of_timm_have_the_same_values(name):
    timm = timm_host.load("timm")
    torch.manual_seed(0)
    svt, dims, heads = "svt" in name, (16, 32), (2, 4)
    host = timm.models.twins.Twins(
        img_size=64,
        embed_dims=dims,
        num_heads=heads,
        mlp_ratios=(4, 2),
        depths=(3, 2),
        sr_ratios=(4, 2),
        num_classes=5,
        wss=(7, 7) if svt else None,
    )
    host = host.double().eval()
    for p in host.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    own = Twins(dims, (3, 2), heads, (7, 7) if svt else None, (4, 2), (4, 2), classes=5).double().eval()
    state = {}
    for key, value in host.state_dict().items():
        state.update(renamed(key, value))
    own.load_state_dict(state)
    x = torch.randn(2, 3, 64, 72, dtype=torch.float64)
    assert torch.allclose(own(x), host(x), atol=1e-10)


def test_parameter_counts_of_twins_and_litv2_hilo():
    with torch.device("meta"):
        assert size(Twins()) == 24060776 and size(pcpvt()) == 24106216
        assert abs(size(LITv2()) / 27.85e6 - 1) < 0.001


def test_twins_features_halve_the_map_for_any_size():
    own = Twins((8, 16), (2, 2), (2, 2), (7, 7), (4, 2), (2, 2)).eval()
    for side in ((56, 56), (84, 70), (61, 47)):
        found = own.features(torch.randn(1, 3, *side))
        assert [tuple(y.shape[1:]) for y in found] == [(8, side[0] // 4, side[1] // 4), (16, side[0] // 8, side[1] // 8)]


def test_litv2_hilo_merging_starts_as_the_convolution():
    layer, x = DeformableMerging(4, 6).eval(), torch.randn(2, 4, 7, 8)
    assert torch.allclose(layer(x), torch.nn.functional.gelu(layer.norm(layer.conv(x))), atol=1e-5)


def test_dropout_of_twins_and_litv2_hilo_stands_in_training():
    torch.manual_seed(0)
    x = torch.randn(2, 36, 8)
    for layer in (LocallyGroupedAttention(8, 2, 3, dropout=0.5), GlobalSubsampledAttention(8, 2, 2, proj_dropout=0.5)):
        assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    for net in (LITv2(8, (2,), (2,), (2,), drop_path=0.5, channels=1, classes=2), Twins((8,), (2,), (2,), (3,), (2,), (2,), dropout=0.5)):
        y = torch.randn(4, net.channels, 16, 16)
        assert not torch.equal(net(y), net(y)) and torch.equal(net.eval()(y), net(y))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: HiLo(10, 4), id="litv2-hilo"),
        pytest.param(lambda: HiLo(8, 4, alpha=1.5), id="litv2-hilo"),
        pytest.param(lambda: HiLo(8, 4, window=0), id="litv2-hilo"),
        pytest.param(lambda: HiLo(8, 4)(torch.randn(1, 6, 8)), id="litv2-hilo"),
        pytest.param(lambda: LITv2(8, (1, 1), (1,), (0, 2)), id="litv2-hilo"),
        pytest.param(lambda: LocallyGroupedAttention(8, 3), id="twins"),
        pytest.param(lambda: LocallyGroupedAttention(8, 2, 0), id="twins"),
        pytest.param(lambda: GlobalSubsampledAttention(8, 2, 4)(torch.randn(1, 15, 8), (5, 3)), id="twins"),
        pytest.param(lambda: Twins((8, 16), (2,)), id="twins"),
        pytest.param(lambda: pair_flops(10, 0), id="twins"),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()
