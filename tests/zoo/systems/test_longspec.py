"""LongSpec: batches with padding, few tokens, drafts that know their target, bad input."""

import pytest
import torch

from regard import RegardError
from regard.generate import generate
from regard.generate.hybrid import hybrid_tree_attention
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.longspec import LongSpec


def test_batches_with_padding_and_long_texts():
    model = llama()
    draft, ids, mask = LongSpec(model, window=4, levels=(3, 4)), torch.tensor([[3, 4, 5], [0, 0, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    truth = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.equal(generate(model, ids, draft, attention_mask=mask, max_new_tokens=30).tokens, truth)
    assert all(k.shape[2] == 5 for k, _ in draft.kept)
    assert not any(name.startswith("target") for name in draft.state_dict())


def test_training_positions():
    draft = LongSpec(llama(length=4000))
    at = draft.places(100, 4000, torch.Generator().manual_seed(0))
    jump = int(at.diff().argmax()) + 1
    assert (at[:jump].tolist() == list(range(jump)) and jump <= 4) or at[0] > 0
    assert (at.diff() == 1).sum() >= 98 and int(at[-1]) <= 3000 and draft.places(1300, 4000).tolist() == list(range(1300))
    assert draft.places(100, 1000).tolist() == list(range(100))
    draft.loss(torch.randint(50, (2, 12))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in draft.parameters())


def test_bad_input():
    model = llama()
    for bad in ({"window": 0}, {"levels": ()}, {"levels": (2, 0)}):
        with pytest.raises(RegardError, match="expected positive numbers"):
            LongSpec(model, **bad)
    with pytest.raises(RegardError, match="belongs to another model"):
        generate(llama(), torch.tensor([[1, 2]]), LongSpec(model))
    draft = LongSpec(model)
    with pytest.raises(RegardError, match="stale=5"):
        draft.loss(torch.ones(1, 5, dtype=torch.long), stale=5)
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RegardError, match="keys behind"):
        hybrid_tree_attention(q, q, q, 1, torch.ones(1, 3, 3, dtype=torch.bool))
