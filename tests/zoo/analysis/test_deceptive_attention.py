"""Penalties at the edge and models on padding."""

import pytest
import torch

import regard
from regard.zoo.analysis.deceptive_attention import BiLSTMAttention, EmbAttention, Translator, attention_penalty, translation


def test_penalties_refuse_bad_shapes_and_hold_at_the_edge():
    a = torch.tensor([[0.0, 1.0]], requires_grad=True)
    penalty = attention_penalty(a, torch.tensor([[0, 1]]), 1.0)  # all on what it must not see
    assert bool(penalty.isfinite()) and float(attention_penalty(a, torch.tensor([[0, 0]]), 1.0)) == pytest.approx(0, abs=1e-9)
    for call, message in (
        (lambda: attention_penalty(a, torch.ones(1, 3), 1.0), "expected"),
        (lambda: attention_penalty(a, torch.ones(1, 2), 1.0, "sum"), "reduce"),
        (lambda: attention_penalty(a, torch.ones(1, 2), -1.0), "lam"),
        (lambda: Translator(5, attention="hard"), "attention"),
        (lambda: translation("sort", 1, 4, 5, torch.Generator()), "kind"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()
    for model in (EmbAttention(9, 8).eval(), BiLSTMAttention(9, 8, 4).eval()):
        logits, alpha = model(torch.tensor([[3, 4, 0, 0], [0, 0, 0, 0]]))
        assert bool(logits.isfinite().all()) and not alpha[0, 2:].any() and not alpha[1].any()
    source, target, _ = translation("copy", 2, 4, 5, torch.Generator())
    assert float(Translator(5, 8, "uniform")(source, target)[1].std()) < 1e-6
