"""Checks of csa."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import image
from regard.lab.verification import check
from regard.tasks.clips import told_channels
from regard.zoo.vision.csa import (
    BoundaryHead,
    ClassSemanticAttention,
    SqueezeExcitation1d,
    boundary_f1,
    detection_loss,
    detection_precision,
    mean_precision,
    span_scores,
)


def over_time(x: Tensor, layer: nn.Conv1d) -> Tensor:
    k = layer.weight.shape[-1]
    wide = torch.nn.functional.pad(x, (k // 2, k // 2))
    assert layer.bias is not None
    return torch.stack([(wide[:, None, :, t : t + k] * layer.weight).sum((2, 3)) + layer.bias for t in range(x.shape[2])], 2)


@check(
    "csa",
    "values and gradients, sum and concat, with residual and another kernel == by hand, moment by moment",
    below=1e-11,
    control="gates from the features",
)
def _() -> tuple[float, float]:
    gaps, f, r = [], image(2, 6, 9), image(2, 6, 9)
    for fuse, residual, kernel in (("sum", False, 3), ("concat", True, 5)):
        layer = drawn(ClassSemanticAttention(6, 6, 2, kernel, fuse, residual))

        def by_hand(
            source: Tensor, layer: ClassSemanticAttention = layer, fuse: str = fuse, residual: bool = residual
        ) -> tuple[Tensor, Tensor, Tensor]:
            first, _, last = layer.channels
            h = (over_time(source, layer.local).mean(2) @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias  # type: ignore[operator]
            conv, _, one = layer.time
            s = over_time(over_time(source, conv).clamp_min(0), one)  # type: ignore[arg-type]
            c, t = 1 / (1 + torch.exp(-h))[..., None], 1 / (1 + torch.exp(-s))
            out = f * c + f * t
            if fuse == "concat":
                assert layer.join is not None
                out = over_time(torch.cat((f * c, f * t), 1), layer.join)
            return out + f if residual else out, c, t

        out, truth = layer(f, r), by_hand(r)
        gaps += [naive.gap(a, b) for a, b in zip(out, truth, strict=True)]
        gaps.append(gap_with_gradients(out[0], truth[0], (f, r, *layer.parameters())))
        other = naive.gap(out[0], by_hand(f)[0])
    return max(gaps), other


@check(
    "csa", "gradient of the gates by the features; gates of constant semantics are constant inside", below=1e-12, control="by the semantics"
)
def _() -> tuple[float, float]:
    layer, f, r = drawn(ClassSemanticAttention(5, 6, 2)), image(2, 6, 9), image(2, 5, 9)
    _, c, t = layer(f, r)
    by_f = torch.autograd.grad(c.sum() + t.sum(), f, allow_unused=True, retain_graph=True)[0]
    by_r = torch.autograd.grad(c.sum() + t.sum(), r)[0]
    flat = layer(f, r[..., :1].expand(-1, -1, 9))[2][..., 1:-1]
    return (0.0 if by_f is None else float(by_f.abs().max())) + naive.gap(flat, flat[..., :1].expand_as(flat)), float(by_r.abs().max())


@check(
    "csa",
    "the head's scores of spans, off means inside them, and losses and precision, off loops",
    below=1e-9,
    control="means one moment longer",
)
def _() -> tuple[float, float]:
    head, x = drawn(BoundaryHead(4, 5, 3)), image(2, 4, 6)
    starts, ends, scores = head(x)
    h = over_time(x, head.trunk[0]).clamp_min(0)  # type: ignore[arg-type]
    marks = over_time(h, head.boundaries)
    gaps, late = [naive.gap(starts, marks[:, 0]), naive.gap(ends, marks[:, 1])], 0.0
    first, _, last = head.proposals
    for d in range(3):
        for t in range(6):
            if t + d + 1 > 6:
                assert bool(scores[:, d, t].isinf().all())
                continue
            for extra in (0, 1):
                inside = h[:, :, t : t + d + 1 + extra].mean(2)
                value = (inside @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias  # type: ignore[operator]
                gap = naive.gap(scores[:, d, t], value[:, 0])
                gaps, late = (gaps, max(late, gap)) if extra else ([*gaps, gap], late)
    a, b, total = torch.tensor([1, 2]), torch.tensor([2, 5]), 0.0
    for logits, wanted in ((starts, a), (ends, b)):
        for n in range(2):
            for t in range(6):
                p = float(torch.sigmoid(logits[n, t].detach()))
                total -= (10 * torch.log(torch.tensor(p)) if t == wanted[n] else torch.log(torch.tensor(1 - p))).item() / 12
    squares = []
    for n in range(2):
        for d in range(3):
            for t in range(6 - d):
                span, own = set(range(t, t + d + 1)), set(range(int(a[n]), int(b[n]) + 1))
                squares.append((float(torch.sigmoid(scores[n, d, t].detach())) - len(span & own) / len(span | own)) ** 2)
    total += 10 * sum(squares) / len(squares)
    close = abs(float(detection_loss((starts, ends, scores), a, b).detach()) - total) < 1e-5
    planted = torch.zeros(2, 3, 6)
    planted[0, 1, 1], planted[1, 0, 0], planted[1, 2, 3] = 0.9, 0.8, 0.7  # right, wrong, right at overlaps 1, 0, 3/4
    area = detection_precision(planted, a, b, top=2)
    return max(gaps) + float(not close) + abs(area - (1 + 2 / 3) / 2), late


class Detector(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.head = kind, BoundaryHead(8, 32, 10)
        self.gate: nn.Module = {"csa": lambda: ClassSemanticAttention(8, 8, 1), "se": lambda: SqueezeExcitation1d(8, 1), "": nn.Identity}[
            kind
        ]()

    def forward(self, f: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.head(self.gate(f, r)[0] if self.kind == "csa" else self.gate(f))  # type: ignore[no-any-return]


@functools.cache
def found(kind: str) -> tuple[float, float]:
    """(F1 of starts and ends, mAP of spans) on new clips after 200 steps."""
    torch.manual_seed(0)
    net, generator = Detector(kind), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        x = told_channels(32, generator, length=32, sizes=(4, 11))
        optimizer.zero_grad()
        detection_loss(net(x.features, x.semantics), x.first, x.last).backward()
        optimizer.step()
    x = told_channels(200, generator, length=32, sizes=(4, 11))
    with torch.no_grad():
        out = net(x.features, x.semantics)
    return boundary_f1(*out[:2], x.first, x.last), mean_precision(span_scores(out), x.first, x.last)


@check(
    "csa",
    "F1 of the bounds of actions whose channel the class tells, after 200 steps",
    above=0.4,
    control="squeeze and excitation of the features",
)
def _() -> tuple[float, float]:
    return found("csa")[0], found("se")[0]


@check("csa", "the same", above=0.4, control="the head alone")
def _() -> tuple[float, float]:
    return found("csa")[0], found("")[0]


@check("csa", "mAP of its spans over overlaps of 0.3 to 0.7", above=0.4, control="squeeze and excitation of the features")
def _() -> tuple[float, float]:
    return found("csa")[1], found("se")[1]


@check(
    "csa",
    "scores of spans, and precision at three overlaps and mAP of planted ones, off loops over what is sorted",
    below=1e-12,
    control="one overlap for all",
)
def _() -> tuple[float, float]:
    starts, ends, scores = torch.randn(3, 7, dtype=F64), torch.randn(3, 7, dtype=F64), torch.randn(3, 4, 7, dtype=F64)
    for d in range(4):
        scores[:, d, 7 - d :] = -torch.inf
    scores[0, 2, 1], scores[1, 1, 0], scores[2, 3, 2] = 6.0, 6.0, 6.0  # overlaps of 1, 2/3 and 1/2
    spans, gaps = span_scores((starts, ends, scores)), []
    p = lambda z: 1 / (1 + math.exp(-float(z)))  # noqa: E731
    for b in range(3):
        for d in range(4):
            for t in range(7):
                truth = p(starts[b, t]) * p(ends[b, t + d]) * p(scores[b, d, t]) if t + d < 7 else 0.0
                gaps.append(abs(float(spans[b, d, t]) - truth))
    first, last = torch.tensor([1, 0, 3]), torch.tensor([3, 2, 4])

    def by_hand(threshold: float) -> float:
        ranked = []
        for b in range(3):
            all_of = sorted(((float(spans[b, d, t]), d, t) for d in range(4) for t in range(7)), reverse=True)[:10]
            ranked += [(score, b, set(range(t, t + d + 1))) for score, d, t in all_of]
        done: set[int] = set()
        area = 0.0
        for at, (_, b, span) in enumerate(sorted(ranked, key=lambda one: -one[0])):
            own = set(range(int(first[b]), int(last[b]) + 1))
            if b not in done and len(span & own) / len(span | own) >= threshold:
                done.add(b)
                area += len(done) / (at + 1) / 3
        return area

    overlaps = (0.3, 0.5, 0.9)
    truths = [by_hand(one) for one in overlaps]
    assert truths[0] > truths[2]
    gaps += [abs(detection_precision(spans, first, last, one) - truth) for one, truth in zip(overlaps, truths, strict=True)]
    gaps.append(abs(mean_precision(spans, first, last, overlaps) - sum(truths) / 3))
    gaps.append(abs(mean_precision(spans, first, last) - sum(by_hand(one) for one in (0.3, 0.4, 0.5, 0.6, 0.7)) / 5))
    return max(gaps), abs(truths[1] - sum(truths) / 3)
