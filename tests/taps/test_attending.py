"""Causal weights are made below the diagonal alone: those of plain softmax, for all heads and queries or some, in any order."""

import pytest
import torch

from regard.taps.attending import PIECE, Softmax, Terms


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [3, 0], [2]])
@pytest.mark.parametrize("rows", [None, [0], [150, 3, 70, 4]])
def test_weights_under_causality_are_plain_ones(first, heads, rows):
    torch.manual_seed(0)
    length = 2 * PIECE + 30
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, 2, first + length, 8), torch.randn(2, 2, first + length, 6)
    rows = list(range(length)) if rows is None else rows
    call = Softmax(q, k, v, lambda q, k, v: (v, None), 0.0, lambda: Terms(0.3, first + length, first=first))
    hidden = torch.ones(length, first + length, dtype=torch.bool).triu(1 + first)
    truth = (0.3 * q @ k.repeat_interleave(2, 1).mT).masked_fill(hidden, -torch.inf).softmax(-1)[:, heads][:, :, rows]
    of, at = torch.tensor(heads), torch.tensor(rows)
    for inputs in ((q, k), (q.requires_grad_(), k)):  # with gradients the whole map is made
        found = Softmax(*inputs, v, call.fused, 0.0, call.terms).weights(of, at)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
        assert found.requires_grad == inputs[0].requires_grad
    seen = Softmax(q.detach(), k, v, call.fused, 0.0, call.terms).seen(of, at)
    torch.testing.assert_close(seen, truth.detach()[..., : seen.shape[-1]], rtol=1e-5, atol=1e-6)
    assert seen.shape[-1] == first + max(rows) + 1


def test_scores_without_bound_give_zeros_and_half_precision_is_widened():
    q, k = torch.full((1, 1, 3, 4), 1e30), torch.full((1, 1, 3, 4), -1e30)
    call = Softmax(q, k, k, lambda q, k, v: (v, None), 0.0, lambda: Terms(1.0, 3, first=0))
    assert not call.weights(torch.tensor([0]), torch.arange(3)).any()
    q, k = torch.randn(1, 1, 3, 4).half(), torch.randn(1, 1, 3, 4).half()
    found = Softmax(q, k, k, call.fused, 0.0, call.terms).weights(torch.tensor([0]), torch.arange(3))
    assert found.dtype == torch.float32 and torch.allclose(found.sum(-1), torch.ones(1, 1, 3))


def test_logits_that_are_kept_are_not_overwritten():
    q = torch.randn(1, 1, 5, 4)
    call = Softmax(q, q, q, lambda q, k, v: (v, None), 0.0, lambda: Terms(1.0, 5))
    logits = call.logits(torch.tensor([0]), torch.arange(5))
    kept = logits.clone()
    assert torch.equal(call.weights(torch.tensor([0]), torch.arange(5), logits), kept.softmax(-1)) and torch.equal(logits, kept)
