"""Class semantics-based attention: what a clip shows weighs the features that find its actions in time (id 135; Sridhar et al., 2021).

R: class-rich features (B, C_r, T), F: features of localisation (B, C_f, T);  gates are made of R and applied to F
g_c = sigmoid(W_2 relu(W_1 mean_t conv_k(R)_t)),  g_t = sigmoid(w . relu(conv_k(R))_t);  F' = F g_c + F g_t, or conv_1x1 [F g_c; F g_t]
The sizes and the way to join them are not public and follow squeeze and excitation, which reads F in place of R.
Spans are found as in BMN: their score is p_start(first) p_end(last) p_overlap; mAP is over overlaps of 0.3 to 0.7, THUMOS's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.plane_gates import narrowed
from regard.nn.parts import takes


@register("csa", kind="module")
class ClassSemanticAttention(nn.Module):
    """features (B, feat, T), semantics (B, sem, T) -> (features, channel gate (B, feat, 1), temporal gate (B, 1, T)).

    reduction: of the channels' net. kernel: of the convolutions over time. fuse: "sum" or "concat" (and a 1 x 1 convolution). residual: adds the
    features.
    """

    def __init__(self, sem: int, feat: int, reduction: int = 4, kernel: int = 3, fuse: str = "sum", residual: bool = False):
        super().__init__()
        if fuse not in ("sum", "concat") or kernel < 1 or kernel % 2 == 0:
            raise RegardError(f"fuse={fuse!r}, kernel={kernel}; expected 'sum' or 'concat', and an odd kernel")
        self.sem, self.feat, self.residual = sem, feat, residual
        hidden = narrowed(feat, reduction)
        self.local = nn.Conv1d(sem, sem, kernel, padding=kernel // 2)
        self.channels = nn.Sequential(nn.Linear(sem, hidden), nn.ReLU(), nn.Linear(hidden, feat))
        self.time = nn.Sequential(nn.Conv1d(sem, sem, kernel, padding=kernel // 2), nn.ReLU(), nn.Conv1d(sem, 1, 1))
        self.join = nn.Conv1d(2 * feat, feat, 1) if fuse == "concat" else None

    def gates(self, semantics: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(self.channels(self.local(semantics).mean(2)))[..., None], torch.sigmoid(self.time(semantics))

    @takes(features="batch feat length", semantics="batch sem length")
    def forward(self, features: Tensor, semantics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        over_channels, over_time = self.gates(semantics)
        one, other = features * over_channels, features * over_time
        out = one + other if self.join is None else self.join(torch.cat((one, other), 1))
        return out + features if self.residual else out, over_channels, over_time


class SqueezeExcitation1d(nn.Module):
    """The baseline: features (B, C, T) times sigmoid(W_2 relu(W_1 mean_t features))."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        hidden = narrowed(channels, reduction)
        self.net = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.net(x.mean(2)))[..., None]


class BoundaryHead(nn.Module):
    """features (B, C, T) -> logits of starts (B, T), of ends (B, T), and of proposals (B, durations, T): entry (d, t) is the span t .. t + d + 1, whose
    features are the mean inside; spans that leave the clip are -inf."""

    def __init__(self, channels: int, hidden: int = 32, durations: int = 32):
        super().__init__()
        self.durations = durations
        self.trunk = nn.Sequential(nn.Conv1d(channels, hidden, 3, padding=1), nn.ReLU())
        self.boundaries, self.proposals = nn.Conv1d(hidden, 2, 1), nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, length = self.trunk(x), x.shape[2]
        starts, ends = self.boundaries(h).unbind(1)
        total = F.pad(h.cumsum(2), (1, 0))
        at, size = torch.arange(length, device=x.device), torch.arange(1, self.durations + 1, device=x.device)[:, None]
        stop = at + size
        inside = (total[:, :, stop.clamp_max(length)] - total[:, :, at][:, :, None]) / size
        scores = self.proposals(inside.movedim(1, -1))[..., 0]
        return starts, ends, scores.masked_fill(stop > length, -torch.inf)


def detection_loss(out: tuple[Tensor, Tensor, Tensor], first: Tensor, last: Tensor, weight: float = 10.0) -> Tensor:
    """Weighted binary logistic losses of starts and ends at `first` and `last` (B,), each clip's span first .. last, positives weighing `weight`; plus
    10 times the mean square of proposals' probabilities off their overlap with the span."""
    starts, ends, scores = out
    length, positive = starts.shape[1], starts.new_tensor(weight)
    loss = sum(
        (
            F.binary_cross_entropy_with_logits(s, F.one_hot(t, length).to(s.dtype), pos_weight=positive)
            for s, t in ((starts, first), (ends, last))
        ),
        starts.new_zeros(()),
    )
    at, size = torch.arange(length, device=first.device), torch.arange(1, scores.shape[1] + 1, device=first.device)[:, None]
    truth = overlap(at[None], (at + size)[None], first[:, None, None], last[:, None, None] + 1)
    real = scores.isfinite()
    return loss + 10 * (torch.sigmoid(scores[real]) - truth.to(scores.dtype)[real]).square().mean()


def overlap(start: Tensor, stop: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Intersection over union of spans [start, stop) and [first, last)."""
    inside = (torch.minimum(stop, last) - torch.maximum(start, first)).clamp_min(0)
    return inside / (stop - start + last - first - inside)


def span_scores(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """p_start(t) p_end(t + d) p_overlap(d, t) of what `BoundaryHead` gives, (B, durations, T); 0 for spans that leave the clip."""
    starts, ends, scores = out
    wide = F.pad(torch.sigmoid(ends), (0, scores.shape[1] - 1)).unfold(1, starts.shape[1], 1)
    return torch.sigmoid(scores) * torch.sigmoid(starts)[:, None] * wide


@torch.no_grad()
def detection_precision(scores: Tensor, first: Tensor, last: Tensor, threshold: float = 0.5, top: int = 10) -> float:
    """Average precision of each clip's `top` proposals, scores (B, D, T), over all clips at overlap `threshold`: the area under precision over
    recall, one span first .. last a clip, found once."""
    b, d, t = scores.shape
    best, at = scores.flatten(1).topk(min(top, d * t), 1)
    start, stop = at % t, at % t + at // t + 1
    right = overlap(start, stop, first[:, None], last[:, None] + 1) >= threshold
    right &= right.cumsum(1) == 1
    hits = right.flatten()[best.flatten().argsort(descending=True)]
    precision = hits.cumsum(0).double() / torch.arange(1, len(hits) + 1, device=hits.device)
    return float((precision * hits).sum() / b)


THUMOS = (0.3, 0.4, 0.5, 0.6, 0.7)


def mean_precision(scores: Tensor, first: Tensor, last: Tensor, thresholds: Sequence[float] = THUMOS, top: int = 10) -> float:
    """mAP: the mean of `detection_precision` over overlaps."""
    if not thresholds:
        raise RegardError("thresholds is empty; expected one overlap or more")
    return sum(detection_precision(scores, first, last, one, top) for one in thresholds) / len(thresholds)


@torch.no_grad()
def boundary_f1(starts: Tensor, ends: Tensor, first: Tensor, last: Tensor) -> float:
    """F1 of the moments whose logits (B, T) are above zero as starts and ends, off `first` and `last` (B,)."""
    hits = found = 0
    for logits, wanted in ((starts, first), (ends, last)):
        hits += int((logits.gather(1, wanted[:, None]) > 0).sum())
        found += int((logits > 0).sum())
    return 2 * hits / (found + 2 * len(first))
