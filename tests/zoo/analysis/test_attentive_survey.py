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
