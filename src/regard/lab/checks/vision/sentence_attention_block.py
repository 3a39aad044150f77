"""Checks of sentence-attention-block."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import batch_norm, image, layer_norm, pointwise, settled
from regard.lab.verification import check
from regard.tasks.images import named_squares
from regard.zoo.vision.sentence_attention_block import AnswerGrounder, SentenceAttention, mean_iou


def gated(layer: Any, x: Tensor, text: Tensor) -> Tensor:
    first, norm, _, last = layer.net
    h = layer_norm(text @ first.weight.T + first.bias, norm).clamp_min(0) @ last.weight.T + last.bias
    e = torch.exp(h)
    return x * (e / e.sum(1, keepdim=True) if layer.kind == "softmax" else e / (1 + e))[..., None, None]


@check(
    "sentence-attention-block",
    "values and gradients with softmax and sigmoid gates, of odd sizes == by hand; softmax gates sum to one",
    below=1e-12,
    control="no norm inside",
)
def _() -> tuple[float, float]:
    gaps, x, text = [], image(2, 6, 3, 5), image(2, 4)
    for kind in ("softmax", "sigmoid"):
        layer = drawn(SentenceAttention(4, 6, kind))
        assert layer.net[0].weight.shape == (16, 4)
        gaps.append(gap_with_gradients(layer(x, text), gated(layer, x, text), (x, text, *layer.parameters())))
    layer = drawn(SentenceAttention(4, 6))
    gaps.append(naive.gap(layer.gate(text).sum(1), torch.ones(2)))
    first, _, _, last = layer.net
    bare = ((text @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias).softmax(1)  # type: ignore[operator]
    return max(gaps), naive.gap(layer(x, text), x * bare[..., None, None])


def stages(widths: tuple[int, ...] = (16, 32, 32)) -> list[nn.Module]:
    inner = (3, *widths[:-1])
    return [
        nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU())
        for i, o in zip(inner, widths, strict=True)
    ]


@check(
    "sentence-attention-block",
    "the net of three stages, 20 x 13 pixels == by hand: image norm, gates, merging from the deepest",
    below=1e-10,
    control="merging without ReLU",
)
def _() -> tuple[float, float]:
    net, x, text = settled(AnswerGrounder(stages((4, 6, 5)), (4, 6, 5), 4)), image(2, 3, 20, 13), image(2, 4)
    assert (
        isinstance(net.image_norm, nn.InstanceNorm2d) and net.image_norm.running_mean is not None and net.image_norm.running_var is not None
    )
    net.image_norm.running_mean.normal_()
    net.image_norm.running_var.uniform_(0.5, 1.5)

    def by_hand(relu: bool) -> Tensor:
        y = (x - net.image_norm.running_mean[:, None, None]) / (net.image_norm.running_var[:, None, None] + 1e-5).sqrt()  # type: ignore[index, union-attr]
        pyramid = []
        for stage in net.stages:
            y = stage(y)
            pyramid.append(y)
        pyramid = [gated(layer, z, text) for layer, z in zip(net.attentions, pyramid, strict=True)]
        y = pyramid[2]
        for at in (1, 0):
            conv, norm = net.merges[at].children()
            low = F.interpolate(
                batch_norm(pointwise(y, conv.weight), norm), size=pyramid[at].shape[2:], mode="bilinear", align_corners=False
            )  # type: ignore[arg-type]
            y = (low + pyramid[at]).clamp_min(0) if relu else low + pyramid[at]
        y = pointwise(y, net.head.weight, net.head.bias)
        return F.interpolate(y, size=(20, 13), mode="bilinear", align_corners=False)

    return gap_with_gradients(net(x, text), by_hand(True), (x, text)), naive.gap(net(x, text), by_hand(False))


WORDS = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))


@functools.cache
def grounded(attention: bool) -> tuple[float, float]:
    """(mean IoU with the named square, with the square named before when another is named) after 120 steps."""
    torch.manual_seed(0)
    net, generator = AnswerGrounder(stages(), (16, 32, 32), 16, dropout=0.0, attention=attention), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(120):
        x, name, masks = named_squares(16, generator)
        target = masks[torch.arange(16), name].long()
        optimizer.zero_grad()
        F.cross_entropy(net(x, WORDS[name]), target, weight=torch.tensor([1.0, 4.0])).backward()
        optimizer.step()
    x, name, masks = named_squares(100, generator)
    with torch.no_grad():
        net.eval()
        own = masks[torch.arange(100), name]
        return mean_iou(net(x, WORDS[name]), own), mean_iou(net(x, WORDS[(name + 1) % 3]), own)


@check(
    "sentence-attention-block",
    "mean IoU with the square whose colour the sentence names, after 120 steps",
    above=0.6,
    control="without the sentence",
)
def _() -> tuple[float, float]:
    return grounded(True)[0], grounded(False)[0]


@check("sentence-attention-block", "mean IoU with the old square once the sentence names another", below=0.2, control="the old sentence")
def _() -> tuple[float, float]:
    own, moved = grounded(True)
    return moved, own
