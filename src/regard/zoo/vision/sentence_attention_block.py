"""Sentence attention: a sentence weighs the channels of every stage of a net, and the answer's pixels are told (id 227; Khoshsirat and Kambhamettu, 2023).

g = softmax_C(W_2 relu(LN(W_1 t))), W_1: d -> 4 d;  y_c = g_c x_c   (or a sigmoid, as in squeeze and excitation)
merge, deepest first: relu(up(BN(conv_1x1 x_low)) + x_high), bilinear;  then dropout, conv_1x1, bilinear to the image's size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.planes import BatchNorm
from regard.nn.parts import takes


@register("sentence-attention-block", kind="module")
class SentenceAttention(nn.Module):
    """x (B, C, H, W), text (B, text_dim) -> x with its channels weighed. norm: "softmax" (the gates sum to one) or "sigmoid". ratio: of the hidden
    width to text_dim. `gate(text)`: (B, C)."""

    def __init__(self, text_dim: int, channels: int, norm: str = "softmax", ratio: int = 4, eps: float = 1e-5):
        super().__init__()
        if norm not in ("softmax", "sigmoid"):
            raise RegardError(f"norm={norm!r}; expected 'softmax' or 'sigmoid'")
        self.text_dim, self.channels, self.kind, hidden = text_dim, channels, norm, ratio * text_dim
        self.net = nn.Sequential(nn.Linear(text_dim, hidden), nn.LayerNorm(hidden, eps), nn.ReLU(), nn.Linear(hidden, channels))

    def gate(self, text: Tensor) -> Tensor:
        logits = self.net(text)
        return logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()

    @takes(x="batch channels height width", text="batch text_dim")
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x * self.gate(text)[..., None, None]


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class AnswerGrounder(nn.Module):
    """Images (B, colours, H, W), text (B, text_dim) -> logits of masks (B, classes, H, W).

    stages: modules in a row, whose outputs are the pyramid, finest first; channels: of each. attention: whether the sentence weighs the stages
    (False: the same net without it). norm: of the gates. image_norm: the released InstanceNorm with running statistics on the image.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        text_dim: int = 384,
        classes: int = 2,
        dropout: float = 0.5,
        norm: str = "softmax",
        attention: bool = True,
        colours: int = 3,
        image_norm: bool = True,
    ):
        super().__init__()
        if len(stages) != len(channels) or not stages:
            raise RegardError(f"{len(stages)} stages, {len(channels)} channels; expected as many of each, one at least")
        self.colours, self.text_dim = colours, text_dim
        self.image_norm = nn.InstanceNorm2d(colours, track_running_stats=True) if image_norm else nn.Identity()
        self.stages = nn.ModuleList(stages)
        self.attentions = nn.ModuleList([SentenceAttention(text_dim, width, norm) for width in channels] if attention else [])
        pairs = zip(channels[1:], channels[:-1], strict=True)
        self.merges = nn.ModuleList([nn.Sequential(nn.Conv2d(low, high, 1, bias=False), BatchNorm(high)) for low, high in pairs])
        self.drop, self.head = nn.Dropout(dropout), nn.Conv2d(channels[0], classes, 1)

    @takes(images="batch colours height width", text="batch text_dim")
    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        x, pyramid = self.image_norm(images), []
        for stage in self.stages:
            x = stage(x)
            pyramid.append(x)
        if len(self.attentions):
            pyramid = [attention(y, text) for attention, y in zip(self.attentions, pyramid, strict=True)]
        x = pyramid[-1]
        for merge, high in zip(reversed(self.merges), reversed(pyramid[:-1]), strict=True):
            x = torch.relu(resized(merge(x), high.shape[2:]) + high)
        return resized(self.head(self.drop(x)), images.shape[2:])


@torch.no_grad()
def mean_iou(logits: Tensor, masks: Tensor) -> float:
    """Intersection over union of the pixels where class 1 is the largest, and masks (B, H, W) bool; mean over images; 1 where both are empty."""
    found = logits.argmax(1) == 1
    both, either = (found & masks).sum((1, 2)), (found | masks).sum((1, 2))
    return float(torch.where(either > 0, both / either.clamp_min(1), 1.0).mean())
