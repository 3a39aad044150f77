"""MQSA-TED: empty sequences, dropout, bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.mqsa_ted import MQSATED, transition_counts


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
