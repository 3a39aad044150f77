"""MQSA-TED: empty sequences, dropout, bad input."""

import math

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.mqsa_ted import MQSATED, QueryBlock, ranking, transition_counts, window_mean


def test_a_sequence_of_padding_is_finite_and_learns_nothing():
    model, items = MQSATED(9, 8, length=5), torch.tensor([[0, 0, 0], [0, 1, 2]])
    model.total(items, torch.tensor([[0, 0, 0], [0, 2, 3]]), transition_counts(items, 9)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (model.embed.weight.grad[0] == 0).all() and model(items).isfinite().all()
    assert not torch.equal(model(items), model(items)) and torch.equal(model.eval()(items), model(items))


def test_bad_input():
    for bad in ({"items": 0}, {"dim": 7, "heads": 2}, {"alpha": 1.5}, {"dropout": 1.0}, {"tau": 0.0}, {"long": 0}):
        with pytest.raises(RegardError, match="expected positive numbers"):
            MQSATED(**{"items": 9, "dim": 8, **bad})
    with pytest.raises(RegardError, match="give the newest ones"):
        MQSATED(9, 8, length=3)(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(RegardError, match="expected"):
        MQSATED(9, 8)(torch.ones(4, dtype=torch.long))


def test_transitions_within_a_span():
    sequences = torch.tensor([[0, 1, 2, 1, 3], [0, 0, 0, 2, 1]])
    for span in (1, 2, 4):
        truth = torch.zeros(5, 5)
        for row in sequences.tolist():
            for a in range(5):
                for b in range(a + 1, min(5, a + span + 1)):
                    if row[a] and row[b]:
                        truth[row[a], row[b]] += 1
        assert torch.equal(transition_counts(sequences, 4, span), truth)


def test_means_of_the_items_that_are_there():
    x, keep = torch.randn(2, 6, 3), torch.tensor([[0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    for length in (1, 3, 9):
        for b in range(2):
            for t in range(6):
                there = [s for s in range(max(0, t - length + 1), t + 1) if keep[b, s]]
                truth = x[b, there].mean(0) if there else torch.zeros(3)
                assert torch.allclose(window_mean(x, keep, length)[b, t], truth, atol=1e-6)


def test_total_loss_and_its_weights():
    model, items = MQSATED(9, 8, length=5, eps=1e-3).eval(), torch.tensor([[0, 4, 5], [1, 2, 3]])
    targets, counts = torch.tensor([[0, 5, 6], [2, 3, 4]]), transition_counts(items, 9)
    kd, own = model.distillation(counts, torch.tensor([4, 5, 1, 2, 3])), model.loss(items, targets)
    half = sum(float(p.square().sum()) for p in model.parameters()) / 2
    assert float(model.total(items, targets, counts)) == pytest.approx(float(own + 0.1 * kd) + 1e-4 * half)
    assert float(model.total(items, targets, counts, kd=2.0, l2=0.5)) == pytest.approx(float(own + 2 * kd) + 0.5 * half)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3}
    assert {m.eps for m in MQSATED(9, 8).modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-24}
    assert MQSATED(9, 8, hidden=5).short_blocks[0].up.out_features == 5 and MQSATED(9, 8).long_blocks[0].up.out_features == 8
    assert len(MQSATED(9, 8, blocks=3).long_blocks) == 3


def test_first_values():
    torch.manual_seed(0)
    model = MQSATED(300, 64, hidden=32)
    assert float(model.embed.weight[1:].std()) == pytest.approx(0.01, rel=0.05) and float(model.embed.weight[0].abs().max()) == 0
    assert float(model.place.weight.std()) == pytest.approx(0.01, rel=0.1) and model.place.weight.shape == (50, 64)
    for block in (*model.short_blocks, *model.long_blocks):
        for layer in (block.q, block.k, block.v, block.up, block.down):
            bound = (6 / sum(layer.weight.shape)) ** 0.5
            assert 0.98 * bound < float(layer.weight.abs().max()) <= bound and float(layer.bias.abs().max()) == 0


def test_dropout_of_attention_and_of_both_layers_of_the_network():
    torch.manual_seed(0)
    block, x, keep = QueryBlock(8, 2, dropout=0.5).double(), torch.randn(1, 40, 8, dtype=torch.float64), torch.ones(1, 40, dtype=torch.bool)
    y = block.norm1(x)
    q, k, v = (layer(z).unflatten(-1, (2, 4)).transpose(1, 2) for layer, z in ((block.q, y), (block.k, x), (block.v, x)))
    p = (q @ k.mT / 2).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    block.down.weight.data.zero_()  # the network is silent: what differs are weights of attention
    assert not torch.allclose(block(x, x, keep), block(x, x, keep))
    assert torch.allclose(block.eval()(x, x, keep), block.norm2((p @ v).transpose(1, 2).flatten(2) + y))
    block.train().v.weight.data.zero_()  # attention is silent: an entry of the network comes through twice or not at all
    block.down.weight.data = torch.eye(8, dtype=torch.float64)
    u = block.norm2(y)
    hidden = torch.relu(block.up(u))
    times = ((block(x, x, keep) - u) / hidden)[hidden > 1e-3].round(decimals=6)
    assert set(times.tolist()) == {0.0, 4.0} and 0.15 < float((times > 0).double().mean()) < 0.35


def test_distillation_drops_in_training():
    model, counts, items = MQSATED(9, 8), torch.rand(10, 10), torch.tensor([3, 4])
    assert float(model.distillation(counts, items)) != float(model.distillation(counts, items))
    assert float(model.eval().distillation(counts, items)) == float(model.distillation(counts, items))


def test_ranks():
    scores = torch.tensor([[0.9, 0.5, 0.1, 0.3], [0.2, 0.8, 0.8, 0.1], [0.4, 0.3, 0.2, 0.1]])
    places = torch.tensor([4, 2, 4])  # behind two, tied with one (which counts against), last
    assert ranking(scores, places, 3) == pytest.approx((2 / 3, (1 / 2 + 1 / math.log2(3)) / 3))
    assert ranking(scores, places, 4) == pytest.approx((1.0, (1 / 2 + 1 / math.log2(3) + 1 / math.log2(5)) / 3))
    wide = torch.arange(12.0)[None]
    assert ranking(wide, torch.tensor([3]))[0] == 1.0 and ranking(wide, torch.tensor([2]))[0] == 0.0
