"""What an error advises works when it is followed, for every mechanism that raises it."""

from __future__ import annotations

import pytest
import torch
from samples import NAMES, sample

import regard
from regard import RegardError, nn


@pytest.mark.parametrize("name", NAMES)
def test_row_statistics_or_a_reason(name):
    call = sample(name)
    try:
        out, stats = regard.attend_with_stats(call.q, call.k, call.v, call.mechanism, **call.inputs)
    except RegardError as why:
        assert "no row statistics" in str(why) and "executor" not in str(why)
    else:
        assert out.shape == (*call.v.shape[:2], 29, 6) and stats.total.shape[:3] == out.shape[:3]


@pytest.mark.parametrize("name", NAMES)
def test_scores_in_a_mask_or_a_way_without(name):
    call, added = sample(name), torch.zeros(29, 29, dtype=torch.float64)
    try:
        call.run(mask=added)
    except RegardError as why:
        assert "expected no mask" in str(why)
        assert call.run().isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_runs_one_way_or_the_other(name, causal):
    x = torch.randn(2, 29, 16)
    try:
        nn.Attention(16, 2, name, causal=causal)(x)
    except RegardError as why:
        assert f"pass causal={not causal}" in str(why)
        assert nn.Attention(16, 2, name, causal=not causal)(x).isfinite().all()


@pytest.mark.parametrize("name", ["offset", "i", "k_len", "mask", "two words"])
def test_inputs_of_taken_names_are_refused(name):
    with pytest.raises(RegardError, match="expected a name"):
        regard.algebra.Input(name, "h")


def test_plans_ignore_no_argument():
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(RegardError, match="unknown input 'dropout_p'"):
        regard.plan(x, x, x, dropout_p=0.1)


@pytest.mark.parametrize("context", [torch.randn(2, 5, 15), torch.randn(1, 5, 16), torch.randn(5, 16)])
def test_contexts_that_do_not_fit_are_refused(context):
    with pytest.raises(RegardError, match="context is a tensor of shape"):
        nn.Attention(16, 2, causal=False)(torch.randn(2, 5, 16), context=context)
