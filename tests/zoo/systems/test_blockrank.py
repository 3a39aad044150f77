"""BlockRank: gradients of scores in training, half precision, bad input, and the model as it was."""

import pytest
import torch

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.blockrank import (
    blockrank_attention,
    blockrank_aux_loss,
    blockrank_positions,
    document_scores,
    rank_by_attention,
    ranking,
)


def batch():
    ids = torch.randint(1, 50, (2, 24))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return ids, labels, torch.ones(2, 4, 6, dtype=torch.bool)


def test_the_loss_of_scores_trains_the_layers_below_alone_and_the_model_comes_back():
    model, (ids, labels, mask) = llama(layers=3), batch()
    before = model(ids, use_cache=False).logits
    with ranking(model, mask, 1) as seen:
        model(input_ids=ids, position_ids=blockrank_positions(mask), use_cache=False)
    blockrank_aux_loss(seen.scores, labels, torch.tensor([[0], [1]]), mask).backward()
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight.grad.abs().sum() > 0 and layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert layers[1].self_attn.v_proj.weight.grad is None and layers[2].self_attn.q_proj.weight.grad is None
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_later_layers_do_not_run():
    model, (ids, labels, mask) = llama(layers=3), batch()
    ran = []
    model.model.layers[2].register_forward_hook(lambda *args: ran.append(2))
    assert rank_by_attention(model, ids, mask, labels, 1).shape == (2, 2) and not ran


def test_half_precision():
    q = torch.randn(2, 2, 24, 8)
    mask = torch.ones(2, 4, 6)
    truth = blockrank_attention(q, q, q, mask)
    assert torch.allclose(blockrank_attention(*(q.bfloat16(),) * 3, mask).float(), truth, atol=0.05)


def test_bad_input():
    q, (ids, labels, mask) = torch.randn(2, 2, 24, 8), batch()
    for wrong, told in ((mask[:, :3], "M . H tokens"), (mask[0], r"\(B, M, H\)"), (torch.ones(2, 1, 24), "at least 2 blocks")):
        with pytest.raises(RegardError, match=told):
            blockrank_attention(q, q, q, wrong)
    right = mask.clone()
    right[0, 1, -1] = False
    with pytest.raises(RegardError, match="padded on the left"):
        blockrank_attention(q, q, q, right)
    scores = torch.randn(2, 2, 16, 24)
    with pytest.raises(RegardError, match="an asked token, and one before it"):
        document_scores(scores, torch.full((2, 24), -100), mask)
    for answers in (torch.tensor([[0], [2]]), torch.tensor([[0], [-1]])):
        with pytest.raises(RegardError, match="at least one a row"):
            blockrank_aux_loss(scores, labels, answers, mask)
    with pytest.raises(RegardError, match="layer=2"), ranking(llama(), mask, 2):
        pass
    with ranking(llama(), mask, 1) as _, pytest.raises(RegardError, match="without attention_mask"):
        model = llama()
        with ranking(model, mask, 1):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def test_scale_places_and_temperature_by_hand():
    q, mask = torch.randn(2, 2, 24, 8), torch.ones(2, 4, 6)
    assert torch.allclose(blockrank_attention(q, q, q, mask, scale=0.1), blockrank_attention(q * 0.1 * 8**0.5, q, q, mask), atol=1e-6)
    for options, first in (({}, 16384), ({"offset": 50}, 50)):
        own = [*range(6), *range(6, 12), *range(6, 12), *range(first, first + 6)]
        assert blockrank_positions(mask, **options)[0].tolist() == own
    scores, answers = torch.randn(2, 2, 8, 24), torch.tensor([[0, -1], [1, 0]])
    labels = torch.full((2, 24), -100)
    labels[:, -2:] = 7
    r = document_scores(scores, labels, mask)
    for options, t in (({}, 0.05), ({"temperature": 0.5}, 0.5)):
        share = (r / t).softmax(1)
        truth = -(share[0, 0].log() + share[1].sum().log()) / 2
        assert torch.allclose(blockrank_aux_loss(scores, labels, answers, mask, **options), truth, atol=1e-6)


def test_ranking_reads_the_last_queries_that_were_asked_for():
    model, (ids, labels, mask) = llama(layers=3), batch()
    own = ids, blockrank_positions(mask, 40)
    with torch.no_grad():
        for last in (5, 16, 99):
            with ranking(model, mask, 1, last) as seen:
                model(input_ids=own[0], position_ids=own[1], use_cache=False)
            assert seen.scores.shape == (2, 4, min(last, 6), 24)
        truth = document_scores(seen.scores, labels, mask).argsort(1, descending=True)
    assert torch.equal(rank_by_attention(model, ids, mask, labels, 1, offset=40), truth)
    asked = labels.clone()
    asked[:, -2] = -100
    with pytest.raises(RegardError, match="one before it, among the last 1 queries"):
        rank_by_attention(model, ids, mask, asked, 1, last=1)
