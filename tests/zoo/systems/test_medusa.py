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


def test_joint_loss_by_labels_and_decay():
    model = llama(20)
    heads, ids = Medusa(model, 2).double(), torch.randint(20, (2, 7))
    for head in heads.heads:
        head[0].linear.weight.data.normal_(std=0.3)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, output_hidden_states=True, use_cache=False)
    hidden = out.hidden_states[-1]

    def ce(logits, late):
        there = labels[:, late:] != -100
        return -logits[:, :-late].log_softmax(-1).gather(-1, ids[:, late:, None])[..., 0][there].mean()

    truth = ce(out.logits, 1) + 0.7 * (0.5 * ce(heads(hidden)[0], 2) + 0.25 * ce(heads(hidden)[1], 3))
    assert torch.allclose(heads.joint_loss(model, ids, labels, weight=0.7, decay=0.5), truth)


def test_the_tree_and_the_ranks_that_are_taken():
    model = llama(20)
    heads, ids = Medusa(model, 3), torch.randint(20, (2, 9))
    assert heads.accuracies(model, ids).shape == (3, 10) and heads.accuracies(model, ids, 4).shape == (3, 4)
    assert len(Medusa(model).heads) == 5 and len(heads.heads[0]) == 2 and len(Medusa(model, 2, layers=0).heads[0]) == 1
    assert len(heads.shape.levels) == 3 and len(Medusa(model).shape.paths) + 0 <= 63 and max(map(len, Medusa(model, 4).shape.paths)) == 4
    found = heads.search_tree(model, ids, 5)
    assert len(found.paths) == 5 and len(heads.search_tree(model, ids).paths) == 63
