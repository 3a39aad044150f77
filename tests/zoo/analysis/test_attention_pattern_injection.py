"""Pattern injection beyond its checks: summaries and topics are learned through either route, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import RegardError, models
from regard.interpret.patterns import PatternMass, contexts, matching, sentences, shifted
from regard.interpret.tables import table_of
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
    standing_out,
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


def test_heads_that_stand_out_and_plans():
    table = table_of(torch.tensor([[0.0, 1, 2], [3, 4, 8]]), "")
    mean, spread = 3.0, float(torch.tensor([0.0, 1, 2, 3, 4, 8]).std(correction=0))
    for deviations in (0.0, 0.3, 1.0, 2.0):
        scores = {(0, 0): 0.0, (0, 1): 1.0, (0, 2): 2.0, (1, 0): 3.0, (1, 1): 4.0, (1, 2): 8.0}
        truth = sorted((at for at, x in scores.items() if x >= mean + deviations * spread), key=lambda at: -scores[at])
        assert standing_out(table, deviations) == truth
    assert standing_out(table) == [(1, 2)]
    uses = [Use(matching()), Use(shifted(1), True)]
    assert planned(2, uses, 2) == {(layer, head): uses[head % 2] for layer in range(2) for head in range(4)}
    assert len(planned(1, uses)) == 6


def test_the_mask_goes_to_the_model_by_the_name_it_was_given():
    seen = []

    class Masked(States):
        def forward(self, ids, real=None):
            seen.append(real)
            return super().forward(ids)

    ids, real = torch.randint(1, 50, (2, 6)), torch.arange(6) < torch.tensor([[6], [4]])
    model = Masked()
    found = discover(model, [(ids, real)], {"shift": shifted(1)}, "real")["shift"]
    with read(model, "weights") as maps:
        model(ids)
    assert seen[0] is real
    pairs = shifted(1)(ids) & real[:, :, None] & real[:, None]
    for layer in range(2):
        mass = (maps["weights", layer] * pairs[:, None]).sum((2, 3)) / real.sum(1)[:, None]
        assert torch.allclose(found.scores[layer], mass.double().mean(0), atol=1e-6)


def test_an_adapter_drops_weights_and_begins_at_zero(monkeypatch):
    uses, x, ids = [None, Use(matching()), None, None], torch.randn(2, 5, 8), torch.randint(1, 5, (2, 5))
    dropped, drop = [], F.dropout
    monkeypatch.setattr(F, "dropout", lambda y, p, training: dropped.append((tuple(y.shape), p, training)) or drop(y, p, training))
    pal = PAL(8, uses, 12, dropout=0.25)
    assert not pal(x, ids).any() and pal.q.weight.any() and not pal.eval()(x, ids).any()
    assert dropped == [((2, 4, 5, 5), 0.25, True), ((2, 4, 5, 5), 0.25, False)]
    released = PAL(8, uses, start="all")
    assert not any(p.any() for p in released.parameters()) and released.down.out_features == 256
    pals = WithAdapters(States(), 32, uses, 8, 0.5, "all").pals
    assert len(pals) == 2 and {pal.dropout for pal in pals} == {0.5} and {pal.q.in_features for pal in pals} == {8}
    assert not any(p.any() for p in pals.parameters())
    lines = BoundaryScorer(64).lines
    assert lines[0].out_features == 128 and not lines[0].bias.any() and not lines[2].bias.any()
    for line in (lines[0], lines[2]):
        bound = (6 / sum(line.weight.shape)) ** 0.5
        assert 0.9 * bound < float(line.weight.abs().max()) <= bound
    assert BoundaryScorer(8, 5).lines[2].in_features == 5
