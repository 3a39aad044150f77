"""Shared attention: padding, a cache of another model, bad input, and the model as it was."""

import pytest
import torch

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.shared_attention import SharedAttention, late_run, map_similarity


def test_rows_of_a_padded_batch_get_what_they_get_alone():
    model, ids, mask = llama(layers=3), torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    before = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    with SharedAttention(model, 0, [2]):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for row, n in ((0, 4), (1, 2)):
            assert torch.equal(model.generate(ids[row : row + 1, -n:], max_new_tokens=6, do_sample=False)[0, n:], both[row, 4:])
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), before)


def test_bad_input():
    model = llama(layers=3)
    for source, sharers in ((2, None), (1, [1]), (-1, [1]), (0, [3]), (0, [])):
        with pytest.raises(RegardError, match="0 <= source < every sharer < 3 layers"):
            SharedAttention(model, source, sharers)
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    with SharedAttention(model, 0), pytest.raises(RegardError, match="filled with sharing on"):
        model(torch.tensor([[4]]), past_key_values=cache)
    with pytest.raises(RegardError, match="all of one length"):
        map_similarity(model, [])
    with pytest.raises(RegardError, match="no two neighbouring layers"):
        late_run(torch.eye(3), 0.5)
