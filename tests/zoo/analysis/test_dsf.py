"""The dynamical-systems framework beyond its checks: layers in models, half precision, recall, and what is refused."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError
from regard.nn import QLSTM, Attention, Decoder, NormalizedAttention
from regard.zoo.analysis.dsf import System, from_linear_attention, from_softmax_attention, recall_accuracy


@pytest.mark.parametrize("make", [lambda: NormalizedAttention(16, 2, 8), lambda: QLSTM(16)])
def test_layers_mix_in_decoders_and_generate_step_by_step(make):
    model = Decoder([make(), make()], vocab=20, dim=16, layers=2).double().eval()
    ids = torch.randint(20, (2, 5))
    out = model.generate(ids, 6)
    for t in range(5, 11):
        assert torch.equal(model(out[:, :t])[:, -1].argmax(-1), out[:, t])
    half = make().bfloat16()
    assert half(torch.randn(1, 4, 16).bfloat16()).dtype == torch.bfloat16
    assert make()(torch.randn(1, 1, 16)).shape == (1, 1, 16)


def test_dropout_drops_weights_in_training_alone():
    layer, x = NormalizedAttention(8, 2, dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.allclose(layer.train()(x), layer.eval()(x))
    assert torch.allclose(layer.eval()(x), layer.eval()(x))
    sums = torch.stack([layer.train()(x) for _ in range(4000)]).mean(0)
    assert torch.allclose(sums, layer.eval()(x), atol=0.05)


def test_gates_far_out_stay_numbers():
    layer = QLSTM(8)
    with torch.no_grad():
        layer.cell.gates.bias[:16] = 1e4  # forget all
        assert layer(torch.randn(1, 5, 8)).isfinite().all()


def test_recall_runs_are_one_by_seed():
    runs = [
        recall_accuracy(lambda: NormalizedAttention(8, key_dim=4), dim=8, length=8, pairs=1, vocab=8, steps=3, batch=4, seed=1)
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and 0 <= runs[0] <= 1


def test_what_does_not_fit_is_refused():
    u = torch.randn(1, 3, 4)
    with pytest.raises(RegardError, match="write has shape"):
        System(u, torch.ones(1, 3, 2), torch.ones(1, 3, 4, 2), torch.ones(1, 3, 4, 2))
    for layer in (Attention(4, 2, "softmax", causal=False), Attention(4, 2, "softmax", kv_heads=1), Attention(4, 2, "gla")):
        with pytest.raises(RegardError, match="expected a causal"):
            from_softmax_attention(layer, u, 2)
    with pytest.raises(RegardError, match="order=-1"):
        from_softmax_attention(Attention(4, 2), u, -1)
    with pytest.raises(RegardError, match="eta="):
        from_linear_attention(Attention(4, 2), u, torch.exp, eta="mean")
    for options in ({"heads": 3}, {"key_dim": 3, "heads": 2}, {"norm": "softmax"}, {"dropout": 1.0}):
        with pytest.raises(RegardError, match="expected multiples"):
            NormalizedAttention(4, **options)
    for made in (NormalizedAttention(4), QLSTM(4)):
        with pytest.raises(RegardError, match="expected"):
            made(torch.randn(1, 3, 5))
