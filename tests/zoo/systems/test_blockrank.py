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
