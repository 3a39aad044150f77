"""MQSA-TED: empty sequences, dropout, bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.mqsa_ted import MQSATED, transition_counts, window_mean


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
