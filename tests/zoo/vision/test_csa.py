"""Refusals and edges of class semantics-based attention and its detector."""

import pytest
import torch

from regard import RegardError
from regard.tasks.clips import told_channels
from regard.zoo.vision.csa import (
    BoundaryHead,
    ClassSemanticAttention,
    SqueezeExcitation1d,
    boundary_f1,
    detection_precision,
    mean_precision,
    overlap,
)


def test_clips_are_what_they_say():
    x = told_channels(20, torch.Generator().manual_seed(0), noise=0.0)
    name = x.semantics[..., 0].argmax(1)
    for b in range(20):
        own = x.features[b, name[b]].nonzero()[:, 0]
        assert own[0] == x.first[b] and own[-1] == x.last[b] and len(own) == x.last[b] - x.first[b] + 1
    assert (x.features.sum(2) >= 8).all()


def test_bounds_and_overlaps():
    logits = torch.full((1, 5), -1.0)
    logits[0, 2] = 1.0
    assert boundary_f1(logits, logits, torch.tensor([2]), torch.tensor([2])) == 1
    assert boundary_f1(logits, -logits, torch.tensor([2]), torch.tensor([2])) == pytest.approx(2 / (5 + 2))
    spans = [torch.tensor(float(x)) for x in (0, 4, 2, 6)]
    assert float(overlap(*spans)) == pytest.approx(2 / 6)
    scores = torch.zeros(1, 2, 3)
    assert detection_precision(scores, torch.tensor([9]), torch.tensor([9])) == 0


def test_both_attentions_stack():
    f, r = torch.randn(2, 8, 6), torch.randn(2, 3, 6)
    out = SqueezeExcitation1d(8)(ClassSemanticAttention(3, 8)(f, r)[0])
    starts, ends, scores = BoundaryHead(8, 4, 9)(out)
    assert starts.shape == ends.shape == (2, 6) and scores.shape == (2, 9, 6) and int(scores.isfinite()[0].sum()) == 6 * 7 // 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassSemanticAttention(3, 8, fuse="max"),
        lambda: ClassSemanticAttention(3, 8, kernel=2),
        lambda: ClassSemanticAttention(3, 2),
        lambda: mean_precision(torch.rand(1, 2, 3), torch.tensor([0]), torch.tensor([1]), ()),
        lambda: ClassSemanticAttention(3, 8)(torch.randn(2, 8, 6), torch.randn(2, 3, 5)),
        lambda: ClassSemanticAttention(3, 8)(torch.randn(2, 8, 6), torch.randn(1, 3, 6)),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()
