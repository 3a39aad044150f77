"""Packing, unpacking, gates and refusals of select-and-pack attention."""

import pytest
import torch

from regard import RegardError
from regard.zoo.vision.spa import (
    SelectGate,
    SelectPackAttention,
    SelectPackBlock,
    SelectPackNet,
    first_fit,
    pack,
    selection_labels,
    selection_loss,
    unpack,
)


def test_images_go_into_the_first_package_with_room():
    assert first_fit([3, 4, 2, 0, 1], 5) == [[(0, 0, 3), (2, 0, 2)], [(1, 0, 4), (4, 0, 1)]]
    assert first_fit([7, 2], 3) == [[(0, 0, 3)], [(0, 3, 6)], [(0, 6, 7), (1, 0, 2)]]
    assert first_fit([0, 0], 3) == []


def test_packing_and_back_changes_nothing():
    x, keep = torch.randn(4, 9, 3), torch.rand(4, 9) < 0.5
    for length in (None, 2, 30):
        packed = pack(x, keep, length)
        assert torch.equal(unpack(packed.tokens, packed, x), x) and int(packed.real.sum()) == int(keep.sum())
        assert torch.equal(unpack(packed.tokens, packed, torch.zeros_like(x)), torch.where(keep[..., None], x, 0.0))
        assert packed.tokens[~packed.real].abs().sum() == 0
    nothing = pack(x, torch.zeros(4, 9, dtype=torch.bool))
    assert len(nothing.tokens) == 0 and torch.equal(unpack(nothing.tokens, nothing, x), x)


def test_nothing_kept_leaves_everything():
    torch.manual_seed(0)
    x, block = torch.randn(2, 5, 8), SelectPackBlock(8, 2)
    torch.nn.init.constant_(block.attention.gate.score.bias, -50.0)
    out = block(x)[0]
    assert torch.equal(out, x)
    out.sum().backward()
    assert SelectPackAttention(8, 2)(x, torch.zeros(2, 5, dtype=torch.bool))[0].abs().max() == 0


def test_noise_moves_choices_in_training_alone():
    torch.manual_seed(0)
    gate, x = SelectGate(8, noise=5.0), torch.randn(2, 50, 8)
    assert not torch.equal(gate(x)[1], gate(x)[1])
    scores, keep, factor = gate.eval()(x)
    assert torch.equal(keep, gate(x)[1]) and torch.equal(keep, scores > 0) and torch.allclose(factor, keep.float(), atol=1e-6)


def test_noise_is_logistic():
    """A score s is kept with probability sigmoid(s / noise)."""
    torch.manual_seed(0)
    gate = SelectGate(2, noise=1.5)
    torch.nn.init.zeros_(gate.score.weight)
    for s in (-3.0, 0.0, 1.0):
        torch.nn.init.constant_(gate.score.bias, s)
        share = float(gate(torch.zeros(1, 20000, 2))[1].float().mean())
        assert share == pytest.approx(1 / (1 + torch.tensor(-s / 1.5).exp().item()), abs=0.015)


def test_labels_are_pooled_by_their_largest():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 5, 2] = True
    assert selection_labels(mask, (2, 2)).tolist() == [[[False, False], [True, False]]]


def test_the_loss_of_choices_by_hand():
    torch.manual_seed(0)
    scores, mask = [torch.randn(2, 2, 3), torch.randn(2, 1, 1)], torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, 1, 5] = mask[1, 3, 0] = mask[1, 0, 3] = True
    labels = [torch.tensor([[[0.0, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 0, 0]]]), torch.ones(2, 1, 1)]
    terms = []
    for s, y in zip(scores, labels, strict=True):
        p = 1 / (1 + (-s).exp())
        terms.append(float(-(y * p.log() + (1 - y) * (1 - p).log()).mean()))
    assert float(selection_loss(scores, mask)) == pytest.approx(sum(terms) / 2, rel=1e-5)


def test_task_loss_alone_reaches_the_gates():
    torch.manual_seed(0)
    net = SelectPackNet((8, 16), (1, 1), (2, 2), classes=3)
    logits, scores = net(torch.randn(2, 3, 17, 16))
    assert logits.shape == (2, 3) and [tuple(s.shape) for s in scores] == [(2, 4, 4), (2, 2, 2)]
    logits.square().sum().backward()
    assert all(float(stage[0].attention.gate.score.weight.grad.abs().max()) > 0 for stage in net.stages)


def test_windows_of_a_net():
    torch.manual_seed(0)
    net = SelectPackNet((8, 16), (2, 1), (2, 2), classes=3, windows=(3, 0))
    assert [(b.window, b.shift) for stage in net.stages for b in stage] == [(3, 0), (3, 1), (0, 0)]
    logits, scores = net(torch.randn(2, 3, 17, 24))
    assert logits.shape == (2, 3) and [tuple(s.shape) for s in scores] == [(2, 4, 6), (2, 4, 6), (2, 2, 3)]
    block, x = SelectPackBlock(8, 2, window=4), torch.randn(1, 6, 8)
    assert torch.allclose(block(x, (2, 3))[0], block.chosen(x)[0], atol=1e-6)  # one window holds it all
    x[:, 5] += 1
    moved = SelectPackBlock(8, 2, window=2)
    assert torch.equal(moved(x, (3, 2))[0][:, :4], moved(torch.cat((x[:, :4], 0 * x[:, 4:]), 1), (3, 2))[0][:, :4])


def test_a_net_by_hand():
    """Stages of blocks on patches, scores as maps, the mean's norm and a linear layer."""
    torch.manual_seed(0)
    net = SelectPackNet((8, 16), (2, 1), (2, 2), classes=3, patch=3).double()
    x, found = torch.randn(2, 3, 13, 12, dtype=torch.float64), []
    logits, scores = net(x)
    for patches, blocks in zip(net.patches, net.stages, strict=True):
        size = patches.kernel_size
        x = torch.nn.functional.conv2d(x, patches.weight, patches.bias, stride=size)
        tokens = x.flatten(2).mT
        for block in blocks:
            tokens, own = block(tokens)
            found.append(own.view(2, *x.shape[2:]))
        x = tokens.mT.reshape(x.shape)
    torch.testing.assert_close(logits, net.head(net.norm(x.mean((2, 3)))))
    assert len(scores) == 3 and all(torch.equal(a, b) for a, b in zip(scores, found, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelectPackAttention(9, 2),
        lambda: SelectPackAttention(8, 2, 0),
        lambda: SelectPackAttention(8, 2)(torch.randn(1, 4, 8), torch.ones(1, 3, dtype=torch.bool)),
        lambda: pack(torch.randn(1, 4, 8), torch.ones(1, 4)),
        lambda: pack(torch.randn(4, 8), torch.ones(4, dtype=torch.bool)),
        lambda: pack(torch.randn(1, 4, 8), torch.ones(1, 4, dtype=torch.bool), -1),
        lambda: SelectPackNet((8,), (1, 1), (2,)),
        lambda: SelectPackNet((8,), (1,), (2,), windows=(2, 2)),
        lambda: SelectPackBlock(8, 2, window=-1),
        lambda: SelectPackBlock(8, 2, window=2, shift=2),
        lambda: SelectPackBlock(8, 2, window=2)(torch.randn(1, 6, 8)),
        lambda: SelectPackBlock(8, 2, window=2)(torch.randn(1, 6, 8), (2, 4)),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()
