"""Counts, schedules, trees and refusals of DependencyViT."""

import pytest
import torch

from regard import RegardError
from regard.zoo.vision.dependencyvit import DependencyViT, ReversedAttention, dependency_tree, parts

SMALL = {"side": 20, "patch": 4, "channels": 2, "classes": 3}


def test_tokens_left_out_follow_the_schedule():
    net = DependencyViT(8, 12, 2, (2, 5, 8, 11), **SMALL).eval()
    _, numbers, message, found, everything = net.run(torch.randn(2, 2, 20, 20))
    left = [25] * 2 + [21] * 3 + [17] * 3 + [13] * 3 + [9]
    assert [d.shape[1] for d in found] == left and numbers.shape == message.shape == (2, 9)
    assert (
        (numbers[:, 1:] > numbers[:, :-1]).all()
        and everything.shape == (2, 25, 8)
        and net.dense(torch.randn(2, 2, 20, 20)).shape == (2, 25, 8)
    )


def test_defaults_and_first_values():
    layer = ReversedAttention(8, 2)
    assert layer.temperature == 0.1 and layer.select.bias is None and layer.control[0].bias is None and layer.qkv.bias is None
    assert layer.out.bias is not None and layer.control[0].out_features == 4
    with torch.device("meta"):
        net = DependencyViT()
    assert len(net.blocks) == 12 and net.blocks[0].attention.heads == 12 and net.norm.eps == 1e-6
    assert float(DependencyViT(8, 1, 2, **SMALL).blocks[0].scale1.weight.detach().max()) == pytest.approx(1e-6)


def test_dropout_stands_in_training():
    torch.manual_seed(0)
    x, layer = torch.randn(1, 6, 8), ReversedAttention(8, 2, dropout=0.5)
    assert not torch.equal(layer(x)[0], layer(x)[0]) and torch.equal(layer.eval()(x)[0], layer(x)[0])
    net, images = DependencyViT(8, 2, 2, scale=1.0, drop_path=0.5, **SMALL), torch.randn(4, 2, 20, 20)
    assert not torch.equal(net(images), net(images)) and torch.equal(net.eval()(images), net(images))


def test_circles_and_single_tokens_have_parts():
    parent, root = torch.tensor([[1, 0, 2, 2, 0]]), torch.tensor([2])
    assert parts(parent, root).tolist() == [[0, 0, 2, 3, 0]]
    assert [x.tolist() for x in dependency_tree(torch.ones(1, 1, 1))] == [[[0]], [0]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReversedAttention(9, 2),
        lambda: ReversedAttention(8, 2, temperature=0.0),
        lambda: ReversedAttention(8, 2)(torch.randn(1, 4, 8), torch.ones(1, 3)),
        lambda: DependencyViT(8, 2, 2, (3,), **SMALL),
        lambda: DependencyViT(8, 2, 2, (1, 2), 0.5, **SMALL),
        lambda: DependencyViT(8, 2, 2, rank="leaves", **SMALL),
        lambda: DependencyViT(8, 2, 2, **SMALL)(torch.randn(1, 2, 16, 20)),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()
