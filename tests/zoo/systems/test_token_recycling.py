"""Token Recycling: the table outlives a prompt and belongs to one vocabulary."""

from types import SimpleNamespace

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


def test_the_table_takes_the_likeliest_of_every_node_that_was_read():
    how, model = TokenRecycling(2, [[0], [1], [0, 0]]), llama()
    state = SimpleNamespace(host=SimpleNamespace(model=model), root=torch.tensor([7, 9]))
    how.begin(state)
    assert how.table.shape == (50, 2) and not how.table.any()
    how.table[7], how.table[3] = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([5, 6], dtype=torch.int32)
    draft = how.draft(state)
    assert draft.tokens.tolist() == [[7, 3, 4, 5], [9, 0, 0, 0]] and draft.parents.tolist() == [[0, 0, 0, 1]]
    logits = torch.randn(2, 4, 50)
    how.learn(state, draft, SimpleNamespace(logits=logits), None, None)
    top = logits.topk(2).indices
    assert torch.equal(how.table[[7, 3, 4, 5, 9, 0]].long(), torch.cat((top[0], top[1, [0, 3]])))  # of equal tokens the last node's
    assert torch.equal(how.table[11], torch.zeros(2, dtype=torch.int32))
    assert len(DEFAULT_80.parents) == 81 and len(DEFAULT_80.levels) == 6 and TokenRecycling().k == 8
