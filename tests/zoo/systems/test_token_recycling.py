"""Token Recycling: the table outlives a prompt and belongs to one vocabulary."""

import pytest
import torch

from regard import RegardError
from regard.generate import generate
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.token_recycling import DEFAULT_80, TokenRecycling

pytest.importorskip("transformers")


def test_a_second_time_is_faster_and_bytes_are_few():
    model, ids, how = llama(), torch.randint(50, (1, 9)), TokenRecycling()
    first = generate(model, ids, how, max_new_tokens=60)
    second = generate(model, ids, how, max_new_tokens=60)
    assert torch.equal(first.tokens, second.tokens) and second.steps < first.steps
    assert how.table.numel() == 50 * 8 and how.table.dtype == torch.int32 and torch.equal(DEFAULT_80.parents, how.shape.parents)
    by_name = generate(model, ids, "token-recycling", max_new_tokens=60)
    assert by_name.steps == first.steps


def test_bad_input():
    for bad in ({"k": 0}, {"k": 2}, {"k": 8, "tree": [[8]]}):
        with pytest.raises(RegardError, match="expected k of at least 1 and ranks below k"):
            TokenRecycling(**bad)
    how = TokenRecycling()
    generate(llama(50), torch.tensor([[1, 2]]), how, max_new_tokens=2)
    with pytest.raises(RegardError, match="the table knows 50 tokens and the model 60"):
        generate(llama(60), torch.tensor([[1, 2]]), how, max_new_tokens=2)
    with pytest.raises(RegardError, match="at most the 5 tokens"):
        generate(llama(5), torch.tensor([[1, 2]]), TokenRecycling(), max_new_tokens=2)
