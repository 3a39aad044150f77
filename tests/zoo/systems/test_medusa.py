"""Medusa: bad input, prompts of one token, texts too short for a head, data of the model's own."""

import pytest
import torch

from regard import RegardError
from regard.generate import Typical, generate
from regard.generate.tuning import own_texts
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.medusa import Medusa

pytest.importorskip("transformers")


def test_one_token_and_batches():
    model = llama()
    heads, ids = Medusa(model, 2), torch.tensor([[3, 4, 5], [0, 0, 7]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    truth = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(generate(model, ids, heads, attention_mask=mask, max_new_tokens=20).tokens, truth)
    assert torch.equal(generate(model, ids[1:, 2:], heads, max_new_tokens=20).tokens[0, 1:], truth[1, 3:])
    generate(model, ids, heads, accept=Typical(), max_new_tokens=20)


def test_short_texts_and_ignored_labels():
    heads = Medusa(llama(20), 3)
    hidden = torch.randn(1, 3, 32, dtype=torch.float64)
    assert heads.loss(hidden[:, :2], torch.tensor([[1, 2]])) == 0 and heads.loss(hidden, torch.full((1, 3), -100)) == 0
    only = heads.loss(hidden, torch.tensor([[1, 2, 3]]))
    truth = -0.8 * heads.heads[0](hidden[:, 0]).log_softmax(-1)[0, 3]
    assert torch.allclose(only, truth)


def test_own_texts_are_the_model_s():
    model, ids = llama(), torch.randint(50, (2, 4))
    assert torch.equal(own_texts(model, ids, 6), model.generate(ids, max_new_tokens=6, do_sample=False))


def test_bad_input():
    model = llama()
    for bad, why in (({"heads": 0}, "heads=0"), ({"heads": 1, "tree": [[0], [0, 0]]}, "at most heads=1")):
        with pytest.raises(RegardError, match=why):
            Medusa(model, **bad)
    with pytest.raises(RegardError, match="needs more than a name"):
        generate(model, torch.tensor([[1]]), "medusa")
