"""The survey's forms: hard positions learn straight through, padding, bad input, and where to look further."""

import importlib

import pytest
import torch

from regard import RegardError
from regard.nn.alignments import alignment
from regard.zoo.analysis.attentive_survey import FORMS, HAN, INTERPRETABILITY, SurveyAttention, find


def test_hard_positions_draw_one_place_and_learn():
    torch.manual_seed(0)
    layer, q, k = SurveyAttention(8, "general", positions="hard"), torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    context, p = layer(q, k, k)
    assert torch.allclose(p.sum(-1), torch.ones(2, 5)) and torch.equal(p.detach().round(decimals=5).unique(), torch.tensor([0.0, 1.0]))
    context.sin().sum().backward()
    assert layer.align.w.weight.grad.abs().sum() > 0
    assert len({tuple(layer(q, k, k)[1].argmax(-1).flatten().tolist()) for _ in range(4)}) > 1
    layer.eval()
    assert torch.equal(layer(q, k, k)[1], layer(q, k, k)[1])


def test_nothing_to_see_gives_zeros():
    q, keep = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [False] * 5])
    for positions in ("soft", "hard", "local-m", "local-p"):
        context, p = SurveyAttention(8, positions=positions)(q, q, q, keep)
        assert context.isfinite().all() and not context[1].any() and not p[1].any() and context[0].any()
    far = SurveyAttention(8, positions="local-m", width=1.0)(torch.randn(1, 9, 8), q[:1, :2], q[:1, :2])[0]
    assert not far[0, 5:].any() and far.isfinite().all()


def test_empty_sentences_and_words_are_nobody_s():
    torch.manual_seed(0)
    ids = torch.randint(1, 9, (2, 3, 4))
    ids[0, 2], ids[1, 0, 2:] = 0, 0
    logits, sentences, words = HAN(9, 8, 2)(ids)
    assert logits.isfinite().all() and sentences[0, 2] == 0 and not words[0, 2].any() and not words[1, 0, 2:].any()


def test_links_and_errors():
    for name in INTERPRETABILITY:
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute)
    with pytest.raises(RegardError, match="sequences: distinctive, co, self"):
        find(sequences="two")
    with pytest.raises(RegardError, match="one of similarity, dot"):
        alignment("cosine", 4)
    with pytest.raises(RegardError, match="does not take layers"):
        alignment("dot", 4, layers=2)
    with pytest.raises(RegardError, match="at most length=3"):
        alignment("location", 4, length=3)(torch.randn(1, 2, 4), torch.randn(1, 5, 4))
    for options in ({"distribution": "soft"}, {"positions": "local"}, {"width": 0}):
        with pytest.raises(RegardError, match="expected one of"):
            SurveyAttention(4, **options)
    with pytest.raises(RegardError, match="even"):
        HAN(9, 7, 2)
    assert len(find()) == len(FORMS)


def test_forms_are_what_their_names_say():
    """Each form made and its place among the axes; (kind, what sets it apart, sequences, abstraction, positions, representations)."""
    forms = {
        "attention": ((8,), "SurveyAttention", {"positions": "soft"}, "distinctive single soft single"),
        "hard attention": ((8,), "SurveyAttention", {"positions": "hard"}, "distinctive single hard single"),
        "local-m attention": ((8,), "SurveyAttention", {"positions": "local-m"}, "distinctive single local single"),
        "local-p attention": ((8,), "SurveyAttention", {"positions": "local-p"}, "distinctive single local single"),
        "self-attention": ((8,), "SelfReading", {}, "self single soft single"),
        "parallel co-attention": ((8,), "CoAttention", {"alternating": False}, "co single soft single"),
        "alternating co-attention": ((8,), "CoAttention", {"alternating": True}, "co single soft single"),
        "hierarchical attention": ((9, 8, 2), "HAN", {}, "self multi soft single"),
        "encoder-decoder": ((9, 8), "RNNSearch", {"pointer": False}, "distinctive single soft single"),
        "pointer network": ((9, 8), "RNNSearch", {"pointer": True}, "distinctive single soft single"),
        "memory network": ((8,), "MemoryHops", {}, "distinctive multi soft single"),
        "multi-representational": ((8,), "MultiRepresentation", {}, "self single soft multi"),
        "multi-dimensional": ((8,), "MultiDimensional", {}, "distinctive single soft multi-dimensional"),
    }
    assert set(FORMS) == set(forms)
    for name, (args, kind, own, axes) in forms.items():
        made, tagged = FORMS[name][0](*args), FORMS[name][1]
        assert type(made).__name__ == kind and {key: getattr(made, key) for key in own} == own
        assert [tagged[axis] for axis in ("sequences", "abstraction", "positions", "representations")] == axes.split()
        assert name in find(**tagged)
    assert set(find(sequences="co")) == {"parallel co-attention", "alternating co-attention"}
    assert (
        FORMS["local-p attention"][0](8, width=2.0).width == 2.0
        and FORMS["self-attention"][0](8, positions="hard").attention.positions == "hard"
    )
    assert len(FORMS["memory network"][0](8).a) == 2 and len(FORMS["memory network"][0](8, hops=3).c) == 3
    assert FORMS["parallel co-attention"][0](8, hidden=5).w_x.in_features == 5 and FORMS["parallel co-attention"][0](8).x.out_features == 8
    assert FORMS["multi-dimensional"][0](8, value_dim=3).out.out_features == 3 == FORMS["multi-dimensional"][0](3).out.out_features


def test_places_near_a_centre_by_hand():
    q, k, v = (
        torch.randn(2, 5, 8, dtype=torch.float64),
        torch.randn(2, 7, 8, dtype=torch.float64),
        torch.randn(2, 7, 3, dtype=torch.float64),
    )
    for width in (4.0, 2.0):
        for distribution in ("softmax", "sigmoid"):
            layer = SurveyAttention(8, distribution=distribution, positions="local-p", width=width).double()
            e = layer.align(q, k)
            centre = 7 * torch.sigmoid(torch.tanh(q @ layer.centre[0].weight.T) @ layer.centre[2].weight.T)
            p = (e.softmax(-1) if distribution == "softmax" else e.sigmoid()) * torch.exp(
                -((torch.arange(7) - centre) ** 2) / (2 * (width / 2) ** 2)
            )
            context, found = layer(q, k, v)
            assert torch.allclose(found, p) and torch.allclose(context, p @ v)
        near = SurveyAttention(8, positions="local-m", width=width).double()
        seen = (torch.arange(7) - torch.arange(5)[:, None]).abs() <= width
        assert torch.allclose(near(q, k, v)[1], near.align(q, k).masked_fill(~seen, -torch.inf).softmax(-1))


def test_hops_and_kinds_by_hand():
    hops, query, memory = (
        FORMS["memory network"][0](6).double(),
        torch.randn(2, 6, dtype=torch.float64),
        torch.randn(2, 4, 6, dtype=torch.float64),
    )
    u, weights = query, []
    for a, c in zip(hops.a, hops.c, strict=True):
        p = torch.einsum("btd,bd->bt", memory @ a.weight.T, u).softmax(1)
        u = u + torch.einsum("bt,btd->bd", p, memory @ c.weight.T)
        weights.append(p)
    out, found = hops(query, memory)
    assert torch.allclose(out, u) and torch.allclose(found, torch.stack(weights, 1))
    several, x = FORMS["multi-representational"][0](6).double(), torch.randn(2, 4, 3, 6, dtype=torch.float64)
    p = (x @ several.w.weight[0] + several.w.bias).softmax(-1)
    assert torch.allclose(several(x)[0], (p[..., None] * x).sum(2)) and torch.allclose(several(x)[1], p)
