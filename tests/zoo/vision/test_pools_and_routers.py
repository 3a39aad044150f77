"""Refusals and edges of bags pooled by attention and of attention in attention."""

import pytest
import torch

from regard import RegardError
from regard.zoo.vision.a2n import A2N, AttentionInAttention, PixelAttention
from regard.zoo.vision.acmil import ACMIL, GatedAttentionPool, MultiQueryACMIL, acmil_loss, concentration, diversity, stochastic_topk_mask


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ACMIL(6, 3, 8, 5, 3), id="acmil"),
        pytest.param(lambda: MultiQueryACMIL(6, 3, 8, 2, 3, attention_dropout=0.0), id="acmil"),
    ],
)
def test_acmil_does_not_read_a_bag_s_padding(make):
    layer, x = make().eval(), torch.randn(2, 9, 6)
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    junk = torch.where(keep[..., None], x, torch.nan)
    alone, both = layer(x[1:, :4]), layer(junk, keep)
    assert torch.allclose(both.bag[1], alone.bag[0], atol=1e-6) and torch.allclose(both.weights[1, ..., :4], alone.weights[0], atol=1e-6)
    assert both.weights[1, ..., 4:].abs().max() == 0
    layer.train()(junk, keep).bag.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_acmil_masks_small_bags_own_share():
    keep = torch.tensor([[True] * 5 + [False] * 7, [True] * 12])
    found = stochastic_topk_mask(torch.randn(2, 12), 10, 0.6, keep)
    assert found.sum(1).tolist() == [3, 6] and not found[0, 5:].any()
    assert stochastic_topk_mask(torch.randn(3, 4), 0, 0.6).sum() == 0 and stochastic_topk_mask(torch.randn(3, 4), 10, 1.0).all()


def test_acmil_with_every_score_masked_reads_evenly():
    layer = ACMIL(6, 3, 8, 5, 2, share=1.0).train()
    assert torch.allclose(layer(torch.randn(1, 4, 6)).weights, torch.full((1, 2, 4), 0.25))
    assert layer.half()(torch.randn(1, 4, 6).half()).bag.isfinite().all()


def test_acmil_tells_scores_as_they_were_used():
    torch.manual_seed(0)
    layer, x, draw = ACMIL(6, 3, 8, 5, 2, masked=4, share=0.5), torch.randn(2, 9, 6), torch.rand(2, 2, 4)
    whole, masked = layer.eval()(x).scores, layer.train()(x, draw=draw).scores
    gone = stochastic_topk_mask(whole, 4, 0.5, draw=draw)
    assert gone.sum() == 2 * 2 * 2 and torch.equal(masked, torch.where(gone, -1e9, whole))
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    assert (layer.eval()(x, keep).scores[1, :, 4:] == -torch.inf).all()


def test_acmil_queries_of_heads():
    torch.manual_seed(0)
    layer, x = MultiQueryACMIL(6, 3, 16, 4, 3, masked=5, share=0.6), torch.randn(2, 9, 6)
    assert 1e-7 < float(layer.queries.detach().std()) < 1e-5
    out = layer.train()(x)
    assert out.scores.shape == (2, 4, 3, 9) and ((out.weights == 0).sum(-1) == 3).all()  # int(5 * 0.6), a head and branch
    assert torch.allclose(concentration(out.weights, 9), torch.ones(2)) and out.branches.shape == (2, 3, 3)
    with torch.no_grad():
        hidden = layer.eval().whole.train()(torch.full((1, 4, 1, 9), 1 / 9), torch.randn(1, 9, 16))
    assert float(hidden.mean().abs()) < 1e-5  # dropout is in front of the norm
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).bag.isfinite().all()
    assert layer.train().half()(torch.randn(1, 4, 6).half()).bag.isfinite().all()


def test_acmil_of_one_branch_has_no_diversity_and_its_loss_is_the_bag_s():
    layer, x, y = ACMIL(6, 3, 8, 5, 1, masked=0), torch.randn(2, 9, 6), torch.tensor([0, 2])
    out = layer(x)
    assert float(diversity(out.weights)) == 0
    assert float(acmil_loss(out, y).detach()) == pytest.approx(float(torch.nn.functional.cross_entropy(out.bag, y).detach()))
    assert torch.allclose(concentration(out.weights, 20), torch.ones(2))


def test_a2n_layers_of_pixels():
    layer = PixelAttention(4)
    x = torch.randn(1, 4, 3, 3)
    assert torch.allclose(layer(x), x * torch.sigmoid(layer.conv(x)))
    first = AttentionInAttention(40).weights(torch.randn(2, 40, 4, 4))
    assert float((first - 0.5).abs().max()) < 0.01  # the temperature keeps the start near even


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: A2N(5), id="a2n"),
        pytest.param(lambda: AttentionInAttention(8, plain_kernel=2), id="a2n"),
        pytest.param(lambda: AttentionInAttention(8, temperature=0.0), id="a2n"),
        pytest.param(lambda: AttentionInAttention(2), id="a2n"),
        pytest.param(lambda: ACMIL(6, 3, branches=0), id="acmil"),
        pytest.param(lambda: ACMIL(6, 3, share=1.2), id="acmil"),
        pytest.param(lambda: ACMIL(6, 3)(torch.randn(2, 0, 6)), id="acmil"),
        pytest.param(lambda: ACMIL(6, 3)(torch.randn(2, 5, 6), torch.zeros(2, 5, dtype=torch.bool)), id="acmil"),
        pytest.param(lambda: ACMIL(6, 3)(torch.randn(2, 5, 6), torch.ones(2, 4, dtype=torch.bool)), id="acmil"),
        pytest.param(lambda: ACMIL(6, 3)(torch.randn(2, 5, 6), draw=torch.rand(2, 5, 4)), id="acmil"),
        pytest.param(lambda: MultiQueryACMIL(6, 3, 10, 4), id="acmil"),
        pytest.param(lambda: MultiQueryACMIL(6, 3, branches=0), id="acmil"),
        pytest.param(lambda: MultiQueryACMIL(6, 3, 8)(torch.randn(2, 0, 6)), id="acmil"),
        pytest.param(lambda: GatedAttentionPool(6)(torch.randn(5, 6)), id="acmil"),
        pytest.param(lambda: stochastic_topk_mask(torch.randn(2, 5), -1, 0.5), id="acmil"),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()
