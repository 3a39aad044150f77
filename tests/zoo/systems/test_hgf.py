"""HGF: tokens of zeros, half precision, the four models, bad input."""

import pytest
import torch

from regard import RegardError
from regard.nn.ternary import BitLinear, HGFLinear, eight_bits, penalty, projection, ternary
from regard.tasks.text import corpus
from regard.zoo.systems.hgf import HGFAttention, HGFDecoder, losses, recovered


def test_levels():
    weights, gamma = ternary(torch.randn(9, 5))
    assert set(weights.unique().tolist()) == {-1.0, 0.0, 1.0} and gamma > 0
    x = eight_bits(torch.randn(3, 50, dtype=torch.float64))
    steps = x * 127 / x.abs().amax(-1, keepdim=True)
    assert torch.allclose(steps, steps.round(), atol=1e-9) and steps.abs().max().item() == pytest.approx(127)
    assert torch.equal(eight_bits(torch.zeros(2, 4)), torch.zeros(2, 4)) and ternary(torch.zeros(2, 2))[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer, x = HGFLinear(16, 8).to(dtype), torch.randn(2, 3, 16, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype and (out.float() - layer.float()(x.float())).abs().max() < 0.1


def test_four_models_are_trained_and_the_penalty_closes_gates():
    text = corpus("letters", [bytes(range(97, 117)) * 40])
    found = losses(text, 1, dim=16, layers=1, heads=2, length=8)
    assert list(found) == ["full", "ternary", "hgf", "full differential"] and len(set(found.values())) == 4
    free, held = (losses(text, 3, names=("hgf",), dim=16, layers=1, heads=2, length=8, openness=c) for c in (0.0, 5.0))
    assert free != held
    model = HGFDecoder(256, 16, 1, 2, 8, gate_bias=-1.0)
    model(torch.zeros(1, 8, dtype=torch.long))
    assert float(penalty(model)) == pytest.approx(torch.sigmoid(torch.tensor(-1.0)).item())


def test_decoder_is_pre_norm_blocks():
    model = HGFDecoder(9, 8, 2, 2, 6, mode="full", differential=True).double().eval()
    ids = torch.randint(9, (2, 5))
    x = model.embed.weight[ids] + model.places[:5]
    norms = iter(model.norms)
    for number, (mixer, mlp) in enumerate(zip(model.mixers, model.mlps, strict=True)):
        assert mixer.first == pytest.approx(0.8 - 0.6 * 2.718281828459045 ** (-0.3 * number))
        x = x + mixer(next(norms)(x))
        h = next(norms)(x) @ mlp[0].weight.T
        x = x + (h * 0.5 * (1 + torch.erf(h / 2**0.5))) @ mlp[2].weight.T
    assert torch.allclose(model(ids), next(norms)(x) @ model.head.weight.T)
    made = HGFDecoder(9, 8, 1, 2, 6, rank=3, gate="channel")
    assert {m.down.out_features for m in made.modules() if isinstance(m, HGFLinear)} == {3} and made.mlps[0][2].gate.out_features == 8


def test_what_cannot_be_is_refused():
    for call in (
        lambda: HGFLinear(4, 4, gate="row"),
        lambda: HGFLinear(4, 4, rank=0),
        lambda: BitLinear(0, 4),
        lambda: BitLinear(4, 4, eps=0.0),
        lambda: projection("binary", 4, 4),
        lambda: HGFAttention(10, 4),
        lambda: HGFAttention(6, 2, differential=True),
        lambda: HGFAttention(8, 2, "full", rank=2),
        lambda: HGFDecoder(8, 16, 1, 2, length=4)(torch.zeros(1, 5, dtype=torch.long)),
        lambda: losses(corpus("x", [b"abc" * 50]), 1, names=("fp8",)),
        lambda: recovered(1.0, 0.5, 1.0),
        lambda: penalty(BitLinear(4, 4)),
    ):
        with pytest.raises(RegardError, match="expected"):
            call()


def test_layers_of_the_decoder_in_turn():
    model, used = HGFDecoder(20, 16, 3, 2, 8), []
    for at, norm in enumerate(model.norms):
        norm.register_forward_hook(lambda *_, at=at: used.append(at))
    model(torch.randint(20, (1, 8)))
    assert used == list(range(7))
    assert [mixer.first for mixer in model.mixers] == pytest.approx([0.2, 0.35550906759, 0.47071301834])
    assert HGFAttention(16, 2, differential=True).first == pytest.approx(0.2)
