"""Recycled attention: chosen keys after an average over neighbours, of one layer by hand."""

import pytest
import torch

pytest.importorskip("transformers")
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.recycled_attention import RecycledAttention


@pytest.mark.parametrize(("pool", "join"), [(1, "sum"), (3, "sum"), (5, "max")])
@torch.no_grad()
def test_chosen_keys_are_those_of_most_weight_around_them(pool, join):
    torch.manual_seed(0)
    model, ids = llama(layers=1, sharp=2), torch.randint(1, 50, (1, 24))
    with RecycledAttention(10, 6, join=join, pool=pool)(model) as session:
        model(ids)
        (part,) = session.cache.layers[0].parts
    model.set_attn_implementation("eager")
    p = model(ids, output_attentions=True, use_cache=False).attentions[0][0, :, -1].unflatten(0, (2, -1))  # heads of a key head together
    score = p.sum(1) if join == "sum" else p.amax(1)
    for head in range(2):
        near = torch.stack([score[head, max(0, j - pool // 2) : j + pool // 2 + 1].sum() for j in range(24)])
        chosen = set(near.topk(6).indices.tolist()) | {23}
        found = part.extract.places[0, head][part.extract.alive[0, head]].tolist()
        assert set(found) == chosen and len(found) == len(chosen)
