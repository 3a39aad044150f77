"""Refusals and edges of sentence attention and of compositional attention."""

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.tasks.images import cued_bumps, distant_signs, named_squares
from regard.zoo.vision.comateformer import Apart, CompositionalAttention, PairClassifier
from regard.zoo.vision.sentence_attention_block import AnswerGrounder, SentenceAttention, mean_iou


def test_comateformer_distances_have_their_gradients():
    q, k = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Apart.apply, (q, k))
    one = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Apart.apply, (one, k))


def test_comateformer_padding_holds_junk_that_nobody_reads():
    x = torch.randn(2, 5, 8)
    keep = torch.tensor([[True] * 5, [True, True, False, False, True]])
    for centre in (False, True):
        layer = CompositionalAttention(8, 2, centre, own=True)
        junk = torch.where(keep[..., None], x, torch.nan)
        out, plain = layer(x, junk, keep), layer(x[1:], x[1:, [0, 1, 4]])
        assert torch.allclose(out[1], plain[0], atol=1e-5) and out.isfinite().all()
        nothing = layer(x, None, torch.zeros(2, 5, dtype=torch.bool))
        assert torch.allclose(nothing, layer.out.bias.expand(2, 5, -1), atol=1e-6)
        assert layer.to(torch.float64)(x.double()).dtype == torch.float64


def test_comateformer_pairs_of_sentences_with_padding():
    net = PairClassifier(8, 9, 16, 2).eval()
    tokens, kinds = torch.randint(8, (2, 7)), torch.zeros(2, 7, dtype=torch.long)
    keep = torch.arange(7) < torch.tensor([[7], [5]])
    assert torch.allclose(net(tokens, kinds, keep)[1], net(tokens[1:, :5], kinds[1:, :5])[0], atol=1e-5)


def test_sentence_attention_block_overlap_of_masks():
    logits = torch.zeros(2, 2, 2, 2)
    logits[0, 1, 0] = 1.0
    masks = torch.zeros(2, 2, 2, dtype=torch.bool)
    masks[0, :, 0] = True
    assert mean_iou(logits, masks) == pytest.approx((1 / 3 + 1) / 2)


def test_without_sentence_attention_block_the_sentence_is_not_read():
    stages = [nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)]
    net = AnswerGrounder(stages, (4, 6), 5, attention=False).eval()
    x = torch.randn(2, 3, 9, 7)
    assert torch.equal(net(x, torch.randn(2, 5)), net(x, torch.randn(2, 5))) and net(x, torch.randn(2, 5)).shape == (2, 2, 9, 7)
    seen = AnswerGrounder(stages, (4, 6), 5).train()
    assert not torch.equal(seen(x, torch.ones(2, 5)), seen(x, torch.ones(2, 5)))  # dropout
    assert float(seen.image_norm.running_mean.abs().max()) > 0


def test_generated_images_are_what_they_say():
    g = torch.Generator().manual_seed(0)
    x, name, masks = named_squares(20, g, noise=0.0)
    assert (
        torch.equal(x.bool(), masks) and (masks.sum((2, 3)) == 64).all() and (masks.sum(1) <= 1).all() and set(name.tolist()) == {0, 1, 2}
    )
    odd = named_squares(3, g, side=35, noise=0.0)[2]
    assert (odd.sum((2, 3)) == 64).all()
    x, label = distant_signs(50, g, noise=0.0)
    left, right = x[:, 0].flatten(1), x[:, 1].flatten(1)
    signs = [torch.where(y.amax(1) > -y.amin(1), 1, -1) for y in (left, right)]
    assert torch.equal((signs[0] == signs[1]).long(), label)
    x, target = cued_bumps(50, g, noise=0.0)
    at = target.flatten(1).argmax(1)
    cue = torch.where(x[:, 1].flatten(1).amax(1) > 0.5, 1.0, -1.0)
    assert (x[:, 0].flatten(1).gather(1, at[:, None])[:, 0] * cue > 0.5).all()
    with pytest.raises(RegardError, match="expected three"):
        named_squares(1, g, side=8)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: CompositionalAttention(9, 2), id="comateformer"),
        pytest.param(
            lambda: CompositionalAttention(8, 2)(torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.ones(1, 3, dtype=torch.bool)),
            id="comateformer",
        ),
        pytest.param(lambda: SentenceAttention(4, 6, "relu"), id="sentence-attention-block"),
        pytest.param(lambda: SentenceAttention(4, 6)(torch.randn(2, 6, 3, 3), torch.randn(3, 4)), id="sentence-attention-block"),
        pytest.param(lambda: AnswerGrounder([], []), id="sentence-attention-block"),
        pytest.param(lambda: AnswerGrounder([nn.Identity()], (3, 4)), id="sentence-attention-block"),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()


def test_comateformer_pair_classifier_by_hand():
    torch.manual_seed(0)
    net = PairClassifier(7, 9, 8, 2, 2, 3, double=True).double()
    tokens, kinds = torch.randint(7, (2, 6)), torch.randint(2, (2, 6))
    x = torch.stack(
        [
            torch.stack([net.words.weight[t] + net.kinds.weight[s] for t, s in zip(*row, strict=True)])
            for row in zip(tokens, kinds, strict=True)
        ]
    )
    x = x + net.places.weight[:6]
    for at in range(2):
        x = x + net.attentions[at](net.norms[2 * at](x))
        first, _, last = net.mlps[at]
        x = x + last(nn.functional.gelu(first(net.norms[2 * at + 1](x))))
    norm, out = net.head
    torch.testing.assert_close(net(tokens, kinds), out(norm(x[:, 0])))
    assert net.attentions[1].twice and not net.attentions[1].centre
