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


def test_the_longest_run_of_alike_layers_and_the_latest_of_equals():
    near = torch.eye(6)
    for a, b in ((0, 1), (1, 2), (3, 4), (4, 5)):
        near[a, b] = near[b, a] = 0.9
    assert late_run(near, 0.9) == (4, [5])
    near[3, 5] = near[5, 3] = 0.95
    assert late_run(near, 0.9) == (3, [4, 5])
    near[0, 2] = near[2, 0] = 0.95
    assert late_run(near, 0.9) == (3, [4, 5]) and late_run(near, -1.0) == (0, [1, 2, 3, 4, 5])


def test_similarity_of_maps_by_hand():
    model, probes = llama(layers=3, sharp=2), [torch.randint(1, 50, (2, 7)), torch.randint(1, 50, (1, 7))]
    found = map_similarity(model, probes)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        runs = [model(ids, output_attentions=True, use_cache=False).attentions for ids in probes]
    maps = [torch.cat([run[layer] for run in runs]).mean((0, 1)).flatten() for layer in range(3)]
    truth = torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in maps]) for a in maps])
    assert torch.allclose(found, truth, atol=1e-5)


def test_every_later_layer_shares_unless_told_otherwise_and_dropped_ones_stay():
    model = llama(layers=4)
    sharing = SharedAttention(model, 1)
    assert sharing.numbers == [2, 3] and [type(layer.self_attn).__name__ for layer in model.model.layers][2:] == ["Sharer"] * 2
    ids = torch.randint(1, 50, (1, 6))
    on = model(ids, use_cache=False).logits
    sharing.drop()
    sharing.remove()
    assert torch.equal(model(ids, use_cache=False).logits, on) and not any(
        "k_proj" in n for n, _ in model.model.layers[3].named_parameters()
    )
    other = llama(layers=4)
    before = other(ids, use_cache=False).logits
    with SharedAttention(other, 0, (3, 1, 1)) as some:
        assert some.numbers == [1, 3] and not torch.equal(other(ids, use_cache=False).logits, before)
    assert torch.equal(other(ids, use_cache=False).logits, before)
