"""Multiple-choice circuits beyond their checks: questions as they say, a trained model taken apart, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import RegardError, models, nn, taps
from regard.interpret.direct import direct_effects
from regard.tasks.choices import ASK, BEGIN, END, WORDS, choices, vocabulary
from regard.zoo.analysis.chinchilla_mcq_circuit_analysis import (
    head_pattern_report,
    letter_kind,
    low_rank_head,
    projector,
    recovered,
    total_effect,
)


@pytest.mark.parametrize("labels", ["standard", "shuffled", "random"])
def test_questions_hold_their_answer(labels):
    found = choices(40, torch.Generator().manual_seed(0), options=3, items=6, alphabets=2, alphabet=1, labels=labels, mark=2)
    first = WORDS + 6
    seen = set()
    for row, shown, right in zip(found.ids.tolist(), found.labels.tolist(), found.correct.tolist(), strict=True):
        assert row[0] == BEGIN and row[-1] == ASK and len(row) == 3 + 4 * 3
        options = [row[2 + 4 * n : 6 + 4 * n] for n in range(3)]
        assert [o[0] for o in options] == shown == [row[p] for p in found.places.tolist()]
        assert all(o[1] == 2 and o[3] == END and WORDS <= o[2] < first for o in options) and len({o[2] for o in options}) == 3
        assert options[right][2] == row[1] and len(set(shown)) == 3
        seen.add(tuple(shown))
    alphabet = set(range(first + 3, first + 6))
    assert all(set(shown) == alphabet for shown in seen) == (labels != "random") and (len(seen) == 1) == (labels == "standard")
    logits = torch.randn(40, vocabulary(3, 6, 2))
    shown = logits.gather(1, found.labels)
    assert torch.allclose(found.centred(logits), logits[range(40), found.answer] - shown.mean(1))
    assert found.accuracy(logits) == float((shown.argmax(1) == found.correct).double().mean())


def test_llama_s_parts_add_up():
    model, given = models.load("tiny"), choices(2, torch.Generator().manual_seed(0))
    towards = F.one_hot(given.answer, 256).float()
    truth = model(given.ids).logits[:, -1].gather(1, given.answer[:, None])[:, 0]
    found = direct_effects(model, given.ids, towards)
    assert torch.allclose(found.total, truth, atol=1e-4) and found.table.scores.shape == (4, 8)


def test_what_does_not_fit_is_refused():
    model, given = models.load("tiny"), choices(2, torch.Generator().manual_seed(0))
    for options in ({"options": 1}, {"options": 30}, {"alphabet": 2}, {"labels": "letters"}):
        with pytest.raises(RegardError, match="options"):
            choices(2, torch.Generator(), **options)
    with pytest.raises(RegardError, match="source"):
        total_effect(model, given.ids, lambda out: given.centred(out.logits[:, -1]), given.ids[:1])
    with pytest.raises(RegardError, match="roles"):
        head_pattern_report(model, given.ids, {"labels": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(RegardError, match="heads holds"):
        low_rank_head(model, (0, 9), given.ids, given.places.tolist(), 3)
    with pytest.raises(RegardError, match="rank=99"):
        low_rank_head(model, (0, 1), given.ids, given.places.tolist(), 99)
    with pytest.raises(RegardError, match="rank=-1"):
        projector([torch.ones(2, 3)], -1)
    with pytest.raises(RegardError, match="tells apart"):
        recovered(1.0, 0.5, 1.0)
    with pytest.raises(RegardError, match="expected regard's Decoder"):
        direct_effects(torch.nn.Linear(2, 2), given.ids, given.ids)
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8
    )
    with pytest.raises(RegardError, match="not the sum of its branches"):
        direct_effects(transformers.Gemma2ForCausalLM(config).eval(), given.ids, torch.ones(2, 40))


def test_kinds_of_letter_heads():
    correct, even = torch.tensor([0, 1]), torch.full((2, 4), 0.2)
    right = torch.tensor([[0.6, 0.1, 0.1, 0.1], [0.1, 0.6, 0.1, 0.1]])
    place = torch.tensor([[0.6, 0.1, 0.1, 0.1]]).expand(2, -1)
    assert [letter_kind(x, correct) for x in (right, place, even, 0.3 * even)] == ["correct", "single", "uniform", "other"]
    assert letter_kind(0.3 * even, correct, least=0.2) == "uniform" and letter_kind(right, correct, least=0.95) == "other"
    assert letter_kind(right, correct, share=0.7) == "uniform" == letter_kind(place, correct, share=0.7)
    assert letter_kind(right, correct, torch.tensor([0.6, 0.5])) == "amplification"
    assert letter_kind(right, correct, torch.tensor([0.6, 0.4])) == "correct"


def test_patterns_at_another_position():
    model = models.load("tiny")
    ids = torch.randint(1, 200, (2, 7))
    roles = {"first": torch.arange(7).expand(2, -1) < 2, "odd": torch.arange(7).expand(2, -1) % 2 == 1}
    with taps.read(model, "weights") as seen:
        model(ids)
    for options, at in (({}, -1), ({"position": 4}, 4)):
        found = head_pattern_report(model, ids, roles, **options)
        for name, role in roles.items():
            truth = torch.stack([(w[:, :, at] * role[:, None]).sum(-1).mean(0) for _, w in seen.items("weights")])
            assert torch.allclose(found[name].scores, truth.to(found[name].scores), atol=1e-5)


def test_a_head_in_few_dimensions_by_hand():
    """Means and projections of queries at the position and of keys and values at the places; what is not compressed stays."""
    model, places = models.load("tiny"), [1, 3, 4]
    ids = torch.randint(1, 200, (6, 7))
    with taps.read(model, ["q", "k", "v"], layers=[0], heads=[1]) as seen:
        model(ids)
    q, k, v = (seen[name, 0][:, 0].double() for name in ("q", "k", "v"))
    found = low_rank_head(model, (0, 1), ids, places, 2, position=5)
    q, k, v = q[:, 5], k[:, places].flatten(0, 1), v[:, places].flatten(0, 1)
    for own, x in ((found.q0, q), (found.k0, k), (found.v0, v)):
        assert torch.allclose(own, x.mean(0))

    def top(*parts):
        stacked = torch.cat([x - x.mean(0) for x in parts])
        _, vectors = torch.linalg.eigh(stacked.T @ stacked)
        return vectors[:, -2:] @ vectors[:, -2:].T

    assert torch.allclose(found.qk, top(q, k), atol=1e-6) and torch.allclose(found.values, top(v), atol=1e-6)
    assert found.position == 5 and found.places == (1, 3, 4) and found.at == (0, 1)
    assert low_rank_head(model, (0, 1), ids, places, 2, scores=False).qk is None
    assert low_rank_head(model, (0, 1), ids, places, 2, values=False).values is None
    assert low_rank_head(model, (0, 1), ids, places, 2).position == -1
    assert recovered(3.0, 2.0, 1.0) == 0.5


def test_projections_have_no_more_dimensions_than_vectors():
    few = torch.randn(2, 5)
    p = projector([few], 4)
    assert torch.allclose(p @ p, p, atol=1e-9) and float(p.trace()) == pytest.approx(2) and torch.allclose(few.double() @ p, few.double())
    assert torch.equal(projector([few], 0), torch.zeros(5, 5).double())


@pytest.mark.parametrize(("scores", "values"), [(True, False), (False, True), (True, True), (False, False)])
@torch.no_grad()
def test_a_patched_head_reads_from_another_position_what_is_compressed_alone(scores, values):
    model, places = models.load("tiny").double(), [1, 3, 4]
    ids = torch.randint(1, 200, (6, 8), generator=torch.Generator().manual_seed(0))
    found = low_rank_head(model, (0, 1), ids, places, 2, position=5, scores=scores, values=values)
    with taps.read(model, ["q", "k", "v", "heads"], layers=[0]) as plain:
        model(ids)
    with found.patched(model), taps.read(model, "heads", layers=[0]) as seen:
        model(ids)
    group = plain["q", 0].shape[1] // plain["k", 0].shape[1]
    q, k, v = plain["q", 0][:, 1, 5], plain["k", 0][:, 1 // group, :6].clone(), plain["v", 0][:, 1 // group, :6].clone()
    s = (k @ q[..., None])[..., 0] / q.shape[-1] ** 0.5
    if scores:
        near = found.q0 + (q - found.q0) @ found.qk
        s[:, places] = ((found.k0 + (k[:, places] - found.k0) @ found.qk) @ near[..., None])[..., 0] / q.shape[-1] ** 0.5
    if values:
        v[:, places] = found.v0 + (v[:, places] - found.v0) @ found.values
    want = plain["heads", 0].clone()
    want[:, 1, 5] = (s.softmax(-1)[:, None] @ v)[:, 0]
    torch.testing.assert_close(seen["heads", 0], want)
    assert torch.allclose(want, plain["heads", 0]) != (scores or values)
    with taps.read(model, "heads", layers=[0]) as after:
        model(ids)
    assert torch.equal(after["heads", 0], plain["heads", 0])


@torch.no_grad()
def test_total_effects_at_some_positions():
    """Of one node at a time, where another prompt's output stands at those positions alone."""
    model = nn.Decoder(vocab=20, dim=16, layers=3, heads=4).double()
    ids, other = (torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def metric(out):
        return out[:, -1, 7]

    found = total_effect(model, ids, metric, other, positions=[2, 4])
    with taps.read(model, ["heads", "mlp"]) as seen:
        model(other)
    clean = metric(model(ids))

    def swapped(new):
        def edit(x):
            out = x.clone()
            out[..., [2, 4], :] = new[..., [2, 4], :]
            return out

        return edit

    with taps.edit(model, {"heads": swapped(seen["heads", 1][:, [3]])}, layers=[1], heads=[3]):
        assert float(found.heads.scores[1, 3]) == pytest.approx(float((clean - metric(model(ids))).mean()), abs=1e-9)
    with taps.edit(model, {"mlp": swapped(seen["mlp", 2])}, layers=[2]):
        assert float(found.mlps[2]) == pytest.approx(float((clean - metric(model(ids))).mean()), abs=1e-9)
    assert found.mlps.shape == (3,) and found.heads.scores.dtype == torch.float64
