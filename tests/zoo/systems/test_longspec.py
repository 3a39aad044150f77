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


def test_training_positions_begin_with_a_sink_and_jump_at_random():
    """A sink of 0 to 4 tokens, then any offset that leaves the last 1,000 of the model's positions, or 30,000 at most."""
    draft = LongSpec(llama(length=4000))
    sinks, offsets = set(), []
    for seed in range(60):
        at = draft.places(10, 1012, torch.Generator().manual_seed(seed))
        moved = (at - torch.arange(10)).tolist()
        sinks.add(moved.count(0) if moved[-1] else None)
        offsets.append(moved[-1])
        assert set(moved) <= {0, moved[-1]} and moved == sorted(moved)
    assert sinks - {None} == {0, 1, 2, 3, 4} and set(offsets) == {0, 1, 2}
    far = [int(draft.places(1100, 10**6, torch.Generator().manual_seed(seed))[-1]) for seed in range(200)]
    assert 28_000 < max(far) <= 29_999 and min(far) < 3_000
    assert draft.places(1199, 10**6, torch.Generator().manual_seed(1))[-1] > 1198 == draft.places(1199, 2198)[-1]
    assert draft.places(1200, 10**6).tolist() == list(range(1200))


def test_loss_reads_the_target_s_last_layer_where_it_stood():
    model = llama(length=4000)
    draft, ids = LongSpec(model, window=3).double(), torch.randint(1, 50, (2, 9))
    for p in draft.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    places = torch.tensor([0, 1, 7, 8, 9, 10, 11, 12, 13])
    out = model(ids, position_ids=places.expand(2, -1), use_cache=True)
    own = out.past_key_values.layers[-1]
    for stale in (1, 4):
        logits = draft(ids, own.keys, own.values, stale, places.expand(2, -1))
        truth = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
        assert torch.allclose(draft.loss(ids, stale, places), truth)
    drawn = [draft.loss(ids, places=places, generator=torch.Generator().manual_seed(seed)).item() for seed in range(12)]
    every = [draft.loss(ids, stale, places).item() for stale in range(1, 5)]
    assert {round(x, 9) for x in drawn} == {round(x, 9) for x in every}
    assert draft.norm1.eps == model.config.rms_norm_eps and LongSpec(model).window == 512 and LongSpec(model).levels == (4, 16, 16, 16, 16)
