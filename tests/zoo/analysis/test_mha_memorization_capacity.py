"""Examples, memory and the bound."""

import pytest
import torch

import regard
from regard.zoo.analysis.mha_memorization_capacity import MemoryAttention, capacity, examples, memorise


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: examples(3, 4, contexts="same"), "contexts"),
        (lambda: examples(3, 9, contexts="permuted", bag=8), "bag"),
        (lambda: MemoryAttention(weights="relu"), "weights"),
        (lambda: MemoryAttention(4, 2, value_dim=2).solve(torch.ones(2, 4), torch.ones(2, 3, 4), torch.ones(2)), "value_dim=1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_numbers_are_memorised_and_capacity_is_the_theorem_s():
    queries, contexts = examples(12, 6, 8)
    found = memorise(queries, contexts, torch.rand(12), heads=6, classes=None, steps=300, lr=1e-2, close=0.1)
    assert found.count == 12 and found.saturated.shape == (6,) and len(found.loss) == 300
    assert capacity([3, 7, 8, 12], 4, 6, 2) == 7
