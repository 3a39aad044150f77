"""Rows that are policies over a cache: batches with padding, bad input."""

import pytest
import torch

from regard import RegardError
from regard.cache import Full
from regard.lab.checks.shared.decoding import llama
from regard.tasks.passkeys import passkeys
from regard.zoo.systems.duoattention import DuoAttention, identify_heads
from regard.zoo.systems.recycled_attention import RecycledAttention, recycled_mask
from regard.zoo.systems.vatp import VATP

pytest.importorskip("transformers")

GATES = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
POLICIES = {
    "duoattention": lambda: DuoAttention(GATES, sink=2, recent=5, chunk=4),
    "vatp": lambda: VATP(sink=2),
    "vatp, scissorhands": lambda: VATP("scissorhands", sink=2, heavy=0.4, window=6),
    "recycled-attention": lambda: RecycledAttention(3, 5),
    "recycled-attention by queries": lambda: RecycledAttention(3, 5, "query_sim", 0.1),
    "recycled-attention, smoothed": lambda: RecycledAttention(3, 5, pool=3, join="max"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_rows_of_a_padded_batch_get_what_they_get_alone(name):
    torch.manual_seed(0)
    model, ids = llama(layers=3, sharp=2), torch.randint(1, 50, (3, 30))
    pads = (0, 9, 3)
    mask = (torch.arange(30) >= torch.tensor(pads)[:, None]).long()
    options = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with POLICIES[name]()(model):
        both = model.generate(ids, attention_mask=mask, **options)
    for row, pad in enumerate(pads):
        with POLICIES[name]()(model):
            alone = model.generate(ids[row : row + 1, pad:], **options)
        gaps = [float((a[0] - b[row]).abs().max()) for a, b in zip(alone.logits, both.logits, strict=True)]
        assert max(gaps) < 1e-6, gaps


def test_bad_input():
    for bad in ({"base": "snapkv"}, {"sink": -1}, {"heavy": 1.5}, {"heavy": 0.0, "recent": 0.0}, {"window": 0}):
        with pytest.raises(RegardError, match="expected 'h2o' or 'scissorhands'"):
            VATP(**bad)
    for bad in ({"stride": 0}, {"k": 0}, {"trigger": "random"}, {"pool": 2}, {"join": "mean"}, {"every": 0}):
        with pytest.raises(RegardError, match="expected positive numbers"):
            RecycledAttention(**bad)
    with pytest.raises(RegardError, match="expected positive numbers"):
        recycled_mask(torch.eye(3)[None, None], 0, 1)


def test_bad_gates():
    model, ids = llama(layers=3), torch.randint(1, 50, (1, 8))
    for bad in ({"sparsity": 1.5}, {"sink": -1}, {"recent": 0}, {"chunk": 0}, {"gates": torch.ones(3)}):
        with pytest.raises(RegardError, match="expected"):
            DuoAttention(**{"gates": GATES, **bad})
    with pytest.raises(RegardError, match="one for each of 3 layers and 2 key heads"):
        DuoAttention(torch.ones(2, 2))(model)
    with pytest.raises(RegardError, match="a token that is asked for"):
        identify_heads(model, lambda step: (ids, torch.zeros_like(ids, dtype=torch.bool)), 1)
    assert model.config._attn_implementation == "sdpa" and all(p.requires_grad for p in model.parameters())
    with pytest.raises(RegardError, match="expected more than twice"):
        passkeys(torch.arange(50), 100)
    assert DuoAttention(GATES, threshold=0.5).retrieves.sum() == 3


def test_beams_of_recycled_attention_take_what_was_chosen_along():
    """The entries that a beam rereads are those of the row that it came from: with all of them chosen beams say what full beams say."""
    torch.manual_seed(0)
    model, ids = llama(layers=2, sharp=2), torch.randint(1, 50, (2, 20))
    found = []
    for policy in (Full(), RecycledAttention(4, 100), RecycledAttention(4, 100, "query_sim", 0.5)):
        with policy(model):
            found.append(model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_recycled_attention_counts_its_extract_which_grows_with_the_part():
    torch.manual_seed(0)
    model, ids = llama(layers=1), torch.randint(1, 50, (1, 20))
    with RecycledAttention(4, 6)(model) as session:
        model.generate(ids, max_new_tokens=4, do_sample=False)  # a full step and two others
    (layer,) = session.cache.layers
    (part,) = layer.parts
    assert part.places.shape[2] == 23 and part.extract.alive.sum(-1).max() <= 6 + 3
    entry = 2 * 2 * 8 * 8  # keys and values of two heads of eight numbers of eight bytes
    assert layer.bytes == entry * (23 + part.extract.places.shape[2]) and layer.held > layer.bytes


def test_duoattention_refuses_gates_that_are_no_numbers():
    with pytest.raises(RegardError, match="expected finite"):
        DuoAttention(torch.full((2, 2), float("nan")))
