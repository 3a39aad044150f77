"""One-stage detection on maps of several strides: YOLOv8's convolution, pooling and head, and its assignment and losses.

A box is (left, top, right, bottom) in pixels. A place's four distances to its box's sides are means of softmax over `bins` numbers of strides
(distribution focal loss, Li et al., 2020); boxes are given to places by task-aligned assignment (Feng et al., 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RegardError
from .planes import BatchNorm


class Found(NamedTuple):
    """What a head says of all places: sides (B, N, 4, bins) and scores (B, N, classes), both logits; places (N, 2), x and y of their centres in
    pixels, and strides (N,)."""

    sides: Tensor
    scores: Tensor
    places: Tensor
    strides: Tensor

    @property
    def boxes(self) -> Tensor:
        """(B, N, 4) in pixels."""
        bins = torch.arange(self.sides.shape[-1], dtype=self.sides.dtype, device=self.sides.device)
        near, far = (self.sides.softmax(-1) @ bins * self.strides[:, None]).chunk(2, -1)
        return torch.cat((self.places - near, self.places + far), -1)


class Detection(NamedTuple):
    """boxes (n, 4), scores (n,) and labels (n,) of an image, the highest score first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def convolved(inner: int, outer: int, size: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, SiLU."""
    return nn.Sequential(nn.Conv2d(inner, outer, size, stride, size // 2, bias=False), BatchNorm(outer), nn.SiLU())


class PooledPyramid(nn.Module):
    """SPPF on (B, C, H, W): 1 x 1 to half the channels, three max pools of `size` one after another, 1 x 1 of all four maps."""

    def __init__(self, inner: int, outer: int, size: int = 5):
        super().__init__()
        self.first, self.last = convolved(inner, inner // 2), convolved(4 * (inner // 2), outer)
        self.pool = nn.MaxPool2d(size, 1, size // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.last(torch.cat(maps, 1))  # type: ignore[no-any-return]


class Detect(nn.Module):
    """Maps (B, channels[i], H_i, W_i) at strides[i] -> `Found`: for each map two 3 x 3 convolutions and a 1 x 1, once for sides, once for scores.

    side: of the images that the first biases of scores suppose, five objects in each.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], classes: int = 80, bins: int = 16, side: int = 640):
        super().__init__()
        if not channels or len(channels) != len(strides):
            raise RegardError(
                f"channels and strides name {len(channels)} and {len(strides)} maps; expected as many of each, and one or more"
            )
        self.strides, self.bins = tuple(strides), bins
        near, far = max(16, channels[0] // 4, 4 * bins), max(channels[0], min(classes, 100))

        def branch(inner: int, width: int, out: int) -> nn.Sequential:
            return nn.Sequential(convolved(inner, width, 3), convolved(width, width, 3), nn.Conv2d(width, out, 1))

        self.sides = nn.ModuleList([branch(c, near, 4 * bins) for c in channels])
        self.scores = nn.ModuleList([branch(c, far, classes) for c in channels])
        for stride, sides, scores in zip(strides, self.sides, self.scores, strict=True):
            nn.init.ones_(sides[-1].bias)  # type: ignore[index]
            nn.init.constant_(scores[-1].bias, math.log(5 / classes / (side / stride) ** 2))  # type: ignore[index]

    def forward(self, maps: Sequence[Tensor]) -> Found:
        sides = [layer(x).flatten(2) for layer, x in zip(self.sides, maps, strict=True)]
        scores = [layer(x).flatten(2) for layer, x in zip(self.scores, maps, strict=True)]
        places, strides = [], []
        for x, stride in zip(maps, self.strides, strict=True):
            rows, columns = (stride * (torch.arange(n, dtype=x.dtype, device=x.device) + 0.5) for n in x.shape[2:])
            places.append(torch.cartesian_prod(rows, columns).flip(-1))
            strides.append(x.new_full((len(rows) * len(columns),), stride))
        return Found(torch.cat(sides, 2).mT.unflatten(-1, (4, self.bins)), torch.cat(scores, 2).mT, torch.cat(places), torch.cat(strides))


def overlap(a: Tensor, b: Tensor, complete: bool = True, eps: float = 1e-7) -> Tensor:
    """Intersection over union of boxes (..., 4); complete: less the squared distance of centres over that of the corners around both, and less
    the difference of aspects (Zheng et al., 2020)."""
    wide = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    both = wide.clamp_min(0).prod(-1)
    (w1, h1), (w2, h2) = ((x[..., 2:] - x[..., :2]).unbind(-1) for x in (a, b))
    h1, h2 = h1 + eps, h2 + eps
    iou = both / (w1 * h1 + w2 * h2 - both + eps)
    if not complete:
        return iou
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).square().sum(-1) + eps
    apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
    aspect = 4 / math.pi**2 * (torch.atan(w2 / h2) - torch.atan(w1 / h1)).square()
    with torch.no_grad():
        weight = aspect / (aspect - iou + 1 + eps)
    return iou - (apart / around + aspect * weight)


@torch.no_grad()
def assigned(
    found: Found, boxes: Tensor, labels: Tensor, top: int = 10, alpha: float = 0.5, beta: float = 6.0, eps: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """(which box each place has (B, N), -1: none; its score to reach (B, N)): the `top` places inside a box by score^alpha overlap^beta, a place
    that several want to the one it overlaps most. labels (B, M): -1 where there is no box."""
    real = (labels >= 0)[..., None]
    gaps = torch.cat((found.places - boxes[:, :, None, :2], boxes[:, :, None, 2:] - found.places), -1)  # (B, M, N, 4)
    inside = (gaps.amin(-1) > eps) & real
    score = found.scores.sigmoid().mT.gather(1, labels.clamp_min(0)[..., None].expand(-1, -1, len(found.places)))
    lap = torch.where(inside, overlap(boxes[:, :, None], found.boxes[:, None]).clamp_min(0), 0.0)
    worth = torch.where(inside, score, 0.0) ** alpha * lap**beta
    best = torch.zeros_like(inside).scatter_(-1, worth.topk(min(top, worth.shape[-1]), -1).indices, True)
    taken = best & inside
    mine = F.one_hot(lap.argmax(1), boxes.shape[1]).mT.bool()
    taken = torch.where(taken.sum(1, keepdim=True) > 1, mine, taken)
    worth = worth * taken
    goal = worth * (lap * taken).amax(-1, keepdim=True) / (worth.amax(-1, keepdim=True) + eps)
    return torch.where(taken.any(1), taken.int().argmax(1), -1), goal.amax(1)


def detection_loss(
    found: Found, boxes: Tensor, labels: Tensor, gains: tuple[float, float, float] = (7.5, 0.5, 1.5), top: int = 10
) -> Tensor:
    """gains . (1 - complete overlap, binary cross entropy of scores, distribution focal loss of sides), weighed by and divided by the scores to reach.

    boxes (B, M, 4) in pixels, labels (B, M) from 0, -1 where there is no box. YOLOv8's own loss is this times B.
    """
    if boxes.shape != (*labels.shape, 4) or len(labels) != len(found.scores):
        raise RegardError(f"boxes {tuple(boxes.shape)}, labels {tuple(labels.shape)}; expected (B={len(found.scores)}, M, 4) and (B, M)")
    if not labels.shape[1]:
        return gains[1] * F.binary_cross_entropy_with_logits(found.scores, torch.zeros_like(found.scores), reduction="sum")
    which, goal = assigned(found, boxes, labels, top)
    has, row = which >= 0, torch.arange(len(which), device=which.device)[:, None]
    target = F.one_hot(labels.clamp_min(0)[row, which.clamp_min(0)], found.scores.shape[-1]) * (goal * has)[..., None]
    total = target.sum().clamp_min(1)
    scores = F.binary_cross_entropy_with_logits(found.scores, target.to(found.scores.dtype), reduction="sum") / total
    unit, weight = found.strides[:, None], goal[has]
    mine = (boxes[row, which.clamp_min(0)] / unit)[has]
    off = ((1 - overlap((found.boxes / unit)[has], mine)) * weight).sum() / total
    places = (found.places / unit).expand(len(which), -1, -1)[has]
    last = found.sides.shape[-1] - 1
    sides = torch.cat((places - mine[:, :2], mine[:, 2:] - places), -1).clamp(0, last - 0.01)
    low, logs = sides.long(), found.sides[has].log_softmax(-1)
    near, far = (-logs.gather(-1, at[..., None])[..., 0] for at in (low, low + 1))
    spread = (near * (low + 1 - sides) + far * (sides - low)).mean(-1)
    return gains[0] * off + gains[1] * scores + gains[2] * (spread * weight).sum() / total


@torch.no_grad()
def detections(found: Found, score: float = 0.25, iou: float = 0.7, most: int = 300) -> list[Detection]:
    """Boxes of at least `score` an image, less those that overlap one of the same class and a higher score by more than `iou`."""
    out = []
    for boxes, scores in zip(found.boxes, found.scores.sigmoid(), strict=True):
        value, label = scores.max(-1)
        order = value.argsort(descending=True)
        order = order[value[order] >= score]
        kept: list[int] = []
        for at in order.tolist():
            rivals = [other for other in kept if label[other] == label[at]]
            if len(kept) < most and not (rivals and bool((overlap(boxes[at], boxes[rivals], complete=False) > iou).any())):
                kept.append(at)
        out.append(Detection(boxes[kept], value[kept], label[kept]))
    return out
