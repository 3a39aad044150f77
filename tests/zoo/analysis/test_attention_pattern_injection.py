"""Pattern injection beyond its checks: summaries and topics are learned through either route, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import RegardError, models
from regard.interpret.patterns import PatternMass, contexts, matching, sentences, shifted
from regard.nn import Attention, Decoder
from regard.nn.embedder import Embedder
from regard.taps import read
from regard.tasks.documents import repeats, summaries, topic_changes
from regard.tasks.training import fit
from regard.zoo.analysis.attention_pattern_injection import (
    PAL,
    BoundaryScorer,
    Patterned,
    SentenceScorer,
    Use,
    WithAdapters,
    discover,
    inject,
    planned,
)


class States(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.host = Embedder(Decoder([Attention(32, 4, causal=False) for _ in range(layers)], vocab=60, dim=32, layers=layers))

    def forward(self, ids):
        return self.host.states(self.host.embed(ids), torch.ones_like(ids).bool())


@pytest.mark.slow
def test_summaries_are_learned_with_patterns_in_heads():
    torch.manual_seed(0)
    model, head = Patterned(States(), {(0, 0): Use(matching((0, 1))), (1, 0): Use(sentences(0, 1))}), SentenceScorer(32)
    places = torch.arange(4)[None] * 6

    def loss(batch):
        return F.binary_cross_entropy(head(model(batch[0]), places.expand(len(batch[0]), -1)), batch[1].float())

    fit(nn.ModuleList((model, head)), lambda g: summaries(32, g, 4, 4, 40), loss, 250, lr=5e-3)
    ids, labels = summaries(300, torch.Generator().manual_seed(5), 4, 4, 40)
    with torch.no_grad():
        found = head(model(ids), places.expand(300, -1)).argsort(dim=1)[:, 2:].sort(1).values
    assert float((found == labels.argsort(dim=1)[:, 2:].sort(1).values).all(1).double().mean()) > 0.8


@pytest.mark.slow
def test_topics_are_learned_with_adapters_on_a_frozen_model():
    torch.manual_seed(0)
    uses = [Use(matching((0, 1))), Use(contexts(1)), Use(shifted(-1), True), Use(shifted(1), True)]
    model, head = WithAdapters(States().requires_grad_(False), 32, uses, width=32), BoundaryScorer(32, 16)
    before = [p.clone() for p in model.model.parameters()]

    def loss(batch):
        return F.binary_cross_entropy_with_logits(head(model(batch[0])), batch[1].float())

    fit(nn.ModuleList((model.pals, head)), lambda g: topic_changes(32, g, 6, 4, 40), loss, 300, lr=5e-3)
    ids, label = topic_changes(300, torch.Generator().manual_seed(5), 6, 4, 40)
    with torch.no_grad():
        assert float(((head(model(ids)) > 0) == (label == 1)).double().mean()) > 0.85
    assert all(torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True))


def test_documents_are_as_they_say():
    draw = torch.Generator().manual_seed(0)
    ids, label = repeats(20, draw, 10, 12)
    assert all(label[b, n] == (ids[b].tolist().count(int(ids[b, n])) > 1) for b in range(20) for n in range(10))
    ids, label = summaries(30, draw, 5, 3, 20)
    for row, own in zip(ids.view(30, 5, 5).tolist(), label.tolist(), strict=True):
        assert all(s[0] == 0 and s[-1] == 1 for s in row)
        words = [w for s in row for w in s[1:-1]]
        twice = [n for n, s in enumerate(row) if any(words.count(w) == 2 for w in s[1:-1])]
        assert len(set(words)) == 14 and twice == [n for n, x in enumerate(own) if x] and min(words) > 1
    ids, change = topic_changes(40, draw, 5, 2, 20)
    for row, x in zip(ids.tolist(), change.tolist(), strict=True):
        assert row[0] == 0 and row[6] == row[12] == 1 and len(set(row[1:6]) & set(row[7:12])) == (0 if x else 2)
    assert 5 < int(change.sum()) < 35
    for made in (lambda: summaries(1, draw, 5, 5, 24), lambda: topic_changes(1, draw, 6, 3, 11)):
        with pytest.raises(RegardError, match="expected"):
            made()


def test_plans_name_heads_in_turn():
    uses = [Use(matching()), Use(shifted(1), True)]
    assert [at for at, use in planned(2, uses, 2).items() if use is uses[1]] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert planned(1, uses)[0, 4] is uses[0] and len(planned(1, uses)) == 6


def test_padding_text_gives_numbers():
    pal = PAL(8, [Use(matching()), None], width=4)
    nn.init.normal_(pal.up.weight)
    real = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    assert pal(torch.randn(2, 3, 8), torch.zeros(2, 3).long(), real).isfinite().all()


def test_what_does_not_fit_is_refused():
    model, ids = models.load("tiny"), torch.randint(97, 103, (2, 9))
    for plan in ({}, {(0, 9): Use(matching())}, {(7, 0): Use(matching())}):
        with pytest.raises(RegardError, match="expected"):
            inject(model, plan, ids)
    with pytest.raises(RegardError, match="one call on these ids"), inject(model, {(0, 0): Use(matching())}, ids[:, :5]):
        model(ids)
    with pytest.raises(RegardError, match="boundary=7"):
        contexts(7)(ids)
    with pytest.raises(RegardError, match="offset=0"):
        shifted(0)
    with pytest.raises(RegardError, match="empty"):
        discover(model, [], {"match": matching()})
    with pytest.raises(RegardError, match="has shape"), read(model, PatternMass(torch.ones(1, 9, 9))):
        model(ids)
    for options in ({"width": 10}, {"start": "none"}):
        with pytest.raises(RegardError, match="start"):
            PAL(8, [None] * 4, **{"width": 8, **options})
    with pytest.raises(RegardError, match="expected"):
        PAL(8, [None], width=4)(torch.randn(2, 3, 7), ids[:, :3])
