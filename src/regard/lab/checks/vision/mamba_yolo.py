"""Checks of mamba-yolo."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import silu
from regard.lab.checks.shared.planes import batch_norm, depthwise, gelu, image, layer_norm, pointwise, settled
from regard.lab.checks.shared.scans import dense_scan, scanned, scanned_map
from regard.lab.verification import check
from regard.nn.images.detection import Found, assigned, detection_loss, detections
from regard.nn.selective_scan import SelectiveScan, cross_merge, cross_scan, selective_scan
from regard.tasks.images import scenes
from regard.zoo.vision.mamba_yolo import SS2D, LSBlock, MambaYOLO, MambaYOLOMini, RGBlock, VSSBlock, mamba_yolo


def norm(x: Tensor, layer: Any, eps: float) -> Tensor:
    return layer_norm(x.movedim(1, -1), layer.norm, eps).movedim(-1, 1)


def ss2d(x: Tensor, layer: SS2D, ways: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    a, z = pointwise(x, layer.first.weight, layer.first.bias).chunk(2, 1)
    if isinstance(layer.conv, torch.nn.Conv2d):
        a = depthwise(a, layer.conv.weight, layer.conv.bias)
    a = gelu(a)
    a = pointwise(a, layer.down.weight) if isinstance(layer.down, torch.nn.Conv2d) else a
    y = norm(scanned_map(a, layer.scan, ways), layer.norm, 1e-5)
    y = pointwise(y, layer.up.weight) if isinstance(layer.up, torch.nn.Conv2d) else y
    return pointwise(y * gelu(z), layer.last.weight, layer.last.bias)


def local(x: Tensor, layer: LSBlock) -> Tensor:
    conv, bn, one, _, two, _ = layer.branch
    return x + pointwise(gelu(pointwise(batch_norm(depthwise(x, conv.weight, conv.bias), bn), one.weight, one.bias)), two.weight, two.bias)


def gated(x: Tensor, layer: RGBlock) -> Tensor:
    p, v = pointwise(x, layer.first.weight, layer.first.bias).chunk(2, 1)
    return pointwise(gelu(depthwise(p, layer.local.weight, layer.local.bias) + p) * v, layer.last.weight, layer.last.bias)


def vss(x: Tensor, layer: VSSBlock) -> Tensor:
    if not isinstance(layer.first, torch.nn.Identity):
        conv, bn, _ = layer.first
        x = silu(batch_norm(pointwise(x, conv.weight, conv.bias), bn))
    y = norm(local(x, layer.local), layer.norm1, 1e-6)
    for scan in layer.scans:
        y = ss2d(y, scan)
    x = x + y
    return x if layer.mlp is None else x + gated(norm(x, layer.norm2, 1e-6), layer.mlp)


@check(
    "mamba-yolo",
    "values and gradients of SS2D of three widths, and of the LS, RG and VSS blocks, also as the neck has them, 5 x 7 pixels == by hand",
    below=1e-9,
    control="the scan by rows alone",
)
def _() -> tuple[float, float]:
    gaps, x = [], image(1, 4, 5, 7)
    for options in (
        {"state": 4},
        {"state": 2, "rank_ratio": 1.0, "rank": 2, "kernel": 1, "bias": True},
        {"state": 3, "ratio": 1.5, "conv_bias": False},
    ):
        layer = settled(SS2D(4, **options))
        gaps.append(gap_with_gradients(layer(x), ss2d(x, layer), (x, *layer.parameters())))
    near, gate = settled(LSBlock(4)), settled(RGBlock(4, 16))
    assert gate.local.weight.shape[0] == 10
    gaps.append(gap_with_gradients(near(x), local(x, near), (x, *near.parameters())))
    gaps.append(gap_with_gradients(gate(x), gated(x, gate), (x, *gate.parameters())))
    for block in (VSSBlock(4, 4, state=2), VSSBlock(4, 6, scans=2, neck=True, state=2), VSSBlock(4, 4, neck=True, ratio=0, state=2)):
        settled(block)
        gaps.append(gap_with_gradients(block(x), vss(x, block), (x, *block.parameters())))
    assert block.first.state_dict() == {}
    return max(gaps), naive.gap(layer(x), ss2d(x, layer, (0,)))


@check("mamba-yolo", "four orders of 5 x 7 pixels merged, off 4 x", below=0.0, control="three orders")
def _() -> tuple[float, float]:
    x = torch.randn(2, 3, 5, 7, dtype=F64)
    orders = cross_scan(x)
    assert torch.equal(orders[0, 1, 0, :6], torch.stack([*x[0, 0, :, 0], x[0, 0, 0, 1]])) and torch.equal(
        orders[:, 3], orders[:, 1].flip(-1)
    )
    three = orders.clone()
    three[:, 3] = 0
    return naive.gap(cross_merge(orders, (5, 7)), 4 * x), naive.gap(cross_merge(three, (5, 7)), 4 * x)


@check(
    "mamba-yolo",
    "the scan in steps and in chunks, of 35 tokens, state 4: values and gradients == the dense lower-triangular form",
    below=1e-9,
    control="no decay, a running sum",
)
def _() -> tuple[float, float]:
    x, b, c = image(1, 2, 35), image(1, 4, 35), image(1, 4, 35)
    delta = torch.rand(1, 2, 35, dtype=F64).requires_grad_()
    a = (-torch.rand(2, 4, dtype=F64) - 0.1).requires_grad_()
    leaves = (x, delta, a, b, c)

    def dense() -> Tensor:
        return torch.stack([dense_scan(x[0, at], delta[0, at], a[at], b[0], c[0]) for at in range(2)])[None]

    gaps = [gap_with_gradients(selective_scan(*leaves, how=how), dense(), leaves) for how in ("steps", "chunks", "auto")]
    return max(gaps), naive.gap(selective_scan(x, delta, 0 * a, b, c), dense())


@check("mamba-yolo", "slope of the first pixel of the scan by the last one", above=1e-6, control="the scan by rows alone")
def _() -> tuple[float, float]:
    x, layer = image(1, 3, 5, 7), settled(SelectiveScan(3, 4, state=4))

    def slope(ways: int) -> float:
        y = layer(cross_scan(x))
        y = torch.cat((y[:, :ways], torch.zeros_like(y[:, ways:])), 1)
        grad = torch.autograd.grad(cross_merge(y, (5, 7))[0, :, 0, 0].sum(), x)[0]
        return float(grad[0, :, -1, -1].abs().max())

    return slope(4), slope(1)


@check(
    "mamba-yolo",
    "a map turned by 180 degrees, the parameters of opposite ways exchanged: the output turned",
    below=1e-10,
    control="not exchanged",
)
def _() -> tuple[float, float]:
    x, layer = image(1, 3, 5, 7), settled(SelectiveScan(3, 4, state=4))
    other = settled(SelectiveScan(3, 4, state=4))
    for mine, its in zip(layer.parameters(), other.parameters(), strict=True):
        its.data.copy_(mine[[2, 3, 0, 1]])
    truth = cross_merge(layer(cross_scan(x)), (5, 7)).flip(2, 3)
    assert naive.gap(layer(cross_scan(x)), scanned(cross_scan(x), layer)) < 1e-10
    return tuple(naive.gap(cross_merge(one(cross_scan(x.flip(2, 3))), (5, 7)), truth) for one in (other, layer))  # type: ignore[return-value]


def yolo_conv(x: Tensor, layer: Any, stride: int = 1, eps: float = 1e-3) -> Tensor:
    conv, bn, _ = layer
    return silu(batch_norm(F.conv2d(x, conv.weight, None, stride, conv.weight.shape[-1] // 2), bn, eps))


def net_by_hand(x: Tensor, net: MambaYOLO) -> tuple[Tensor, Tensor]:
    """Sides (B, N, 4 bins) and scores (B, N, classes), by the blocks themselves."""
    maps = []
    stages: Any = net.stages
    for at, stage in enumerate(stages):
        down, *blocks = stage
        if at == 0:
            one, bn1, _, two, bn2, _ = down
            x = gelu(batch_norm(F.conv2d(x, one.weight, None, 2, 1), bn1, 1e-3))
            x = silu(batch_norm(F.conv2d(x, two.weight, None, 2, 1), bn2, 1e-3))
        else:
            conv, bn, _ = down.mix
            four = [x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]]
            x = silu(batch_norm(pointwise(torch.cat(four, 1), conv.weight, conv.bias), bn, 1e-3))
        for block in blocks:
            x = block(x)
        maps.append(x)
    pools = [yolo_conv(maps[3], net.pool.first)]
    for _ in range(3):
        wide = F.pad(pools[-1], (2, 2, 2, 2), value=-math.inf)
        pools.append(wide.unfold(2, 5, 1).unfold(3, 5, 1).amax((-1, -2)))
    high = yolo_conv(torch.cat(pools, 1), net.pool.last)
    twice = [lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3)] * 2
    middle = net.neck[0](torch.cat((twice[0](high), maps[2]), 1))
    low = net.neck[1](torch.cat((twice[1](middle), maps[1]), 1))
    middle = net.neck[2](torch.cat((yolo_conv(low, net.downs[0], 2), middle), 1))
    high = net.neck[3](torch.cat((yolo_conv(middle, net.downs[1], 2), high), 1))
    out = []
    for branches in (net.head.sides, net.head.scores):
        rows = []
        parts: Any = branches
        for y, (one, two, last) in zip((low, middle, high), parts, strict=True):
            y = yolo_conv(yolo_conv(y, one), two)
            rows.append(pointwise(y, last.weight, last.bias).flatten(2).mT)
        out.append(torch.cat(rows, 1))
    return out[0], out[1]


def decoded(net: MambaYOLO, sides: Tensor, shape: tuple[int, int]) -> Tensor:
    """Boxes (B, N, 4), place by place."""
    rows, at = [], 0
    for stride in (8, 16, 32):
        for i in range(shape[0] // stride):
            for j in range(shape[1] // stride):
                p = sides[:, at].unflatten(-1, (4, 16)).exp()
                far = (p * torch.arange(16)).sum(-1) / p.sum(-1) * stride
                x, y = (j + 0.5) * stride, (i + 0.5) * stride
                rows.append(torch.stack((x - far[:, 0], y - far[:, 1], x + far[:, 2], y + far[:, 3]), -1))
                at += 1
    return torch.stack(rows, 1)


@check(
    "mamba-yolo",
    "the detector's scores, sides and boxes == its parts wired by hand, 64 x 96 pixels",
    below=1e-9,
    control="without its neck",
)
def _() -> tuple[float, float]:
    net, x = settled(MambaYOLO(3, (8, 8, 16, 8), (1, 1, 2, 1), state=2), 0.1), torch.randn(1, 3, 64, 96, dtype=F64)
    with torch.no_grad():
        found, (sides, scores) = net(x), net_by_hand(x, net)
        gaps = [
            naive.gap(found.scores, scores),
            naive.gap(found.sides.flatten(2), sides),
            naive.gap(found.boxes, decoded(net, sides, (64, 96))),
        ]
        maps = [x]
        for stage in net.stages:
            maps.append(stage(maps[-1]))
        return max(gaps), naive.gap(net.head((*maps[2:4], net.pool(maps[4]))).scores, scores)


@check("mamba-yolo", "parameters of T, B and L in millions, off 6.1, 21.8 and 57.6", below=0.05, control="without the gated MLPs")
def _() -> tuple[float, float]:
    def off(**options: Any) -> float:
        gaps = []
        for size, told in (("T", 6.1), ("B", 21.8), ("L", 57.6)):
            with torch.device("meta"):
                gaps.append(abs(sum(p.numel() for p in mamba_yolo(size, **options).parameters()) / 1e6 - told))
        return max(gaps)

    return off(), off(ratio=0)


def complete_overlap(a: list[float], b: list[float], complete: bool = True) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both, sizes = max(wide, 0) * max(high, 0), [(x[2] - x[0], x[3] - x[1] + 1e-7) for x in (a, b)]
    iou = both / (sizes[0][0] * sizes[0][1] + sizes[1][0] * sizes[1][1] - both + 1e-7)
    if not complete:
        return iou
    around = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2 + 1e-7
    apart = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
    v = 4 / math.pi**2 * (math.atan(sizes[1][0] / sizes[1][1]) - math.atan(sizes[0][0] / sizes[0][1])) ** 2
    return iou - apart / around - v * v / (v - iou + 1 + 1e-7)


def loss_by_hand(found: Found, boxes: Tensor, labels: Tensor, top: int) -> float:
    """Image by image, place by place, in plain numbers."""
    parts, total, wanted = [0.0, 0.0, 0.0], 0.0, []
    for image_at in range(len(boxes)):
        own, scores = found.boxes[image_at].tolist(), found.scores[image_at].sigmoid().tolist()
        laps, worths = dict[tuple[int, int], float](), dict[tuple[int, int], float]()
        takers: dict[int, list[int]] = {}
        for m in range(boxes.shape[1]):
            if labels[image_at, m] < 0:
                continue
            box = boxes[image_at, m].tolist()
            for n, (x, y) in enumerate(found.places.tolist()):
                if box[0] < x < box[2] and box[1] < y < box[3]:
                    laps[m, n] = max(complete_overlap(box, own[n]), 0.0)
                    worths[m, n] = scores[n][int(labels[image_at, m])] ** 0.5 * laps[m, n] ** 6
            inside = sorted((n for k, n in worths if k == m), key=lambda n, m=m: -worths[m, n])[:top]
            for n in inside:
                takers.setdefault(n, []).append(m)
        chosen = {
            n: max((k for k, p in laps if p == n), key=lambda k, n=n: laps[k, n]) if len(who) > 1 else who[0] for n, who in takers.items()
        }
        most = {m: max((worths[m, n] for n in chosen if chosen[n] == m), default=0.0) for m in range(boxes.shape[1])}
        near = {m: max((laps[m, n] for n in chosen if chosen[n] == m), default=0.0) for m in range(boxes.shape[1])}
        wanted.append({n: (m, worths[m, n] * near[m] / (most[m] + 1e-9)) for n, m in chosen.items()})
        total += sum(goal for _, goal in wanted[-1].values())
    for image_at, mine in enumerate(wanted):
        own = found.boxes[image_at].tolist()
        for n in range(len(found.places)):
            m, goal = mine.get(n, (-1, 0.0))
            for k, s in enumerate(found.scores[image_at, n].tolist()):
                t = goal if m >= 0 and k == int(labels[image_at, m]) else 0.0
                parts[1] += -t * math.log(1 / (1 + math.exp(-s))) - (1 - t) * math.log(1 - 1 / (1 + math.exp(-s)))
            if m < 0:
                continue
            stride, box, place = float(found.strides[n]), boxes[image_at, m].tolist(), found.places[n].tolist()
            parts[0] += (1 - complete_overlap([z / stride for z in own[n]], [z / stride for z in box])) * goal
            for side, far in enumerate((place[0] - box[0], place[1] - box[1], box[2] - place[0], box[3] - place[1])):
                far = min(max(far / stride, 0), 15 - 0.01)
                logs = found.sides[image_at, n, side].log_softmax(-1).tolist()
                low = int(far)
                parts[2] += -goal / 4 * (logs[low] * (low + 1 - far) + logs[low + 1] * (far - low))
    return (7.5 * parts[0] + 0.5 * parts[1] + 1.5 * parts[2]) / max(total, 1)


@check(
    "mamba-yolo",
    "the loss of three scales, overlapping and missing boxes == place by place",
    below=1e-9,
    control="every place inside a box taken",
)
def _() -> tuple[float, float]:
    net = settled(MambaYOLO(3, (8, 8, 8, 8), (1, 1, 1, 1), state=2), 0.02)
    torch.manual_seed(2)
    with torch.no_grad():
        found = net(torch.randn(2, 3, 64, 96, dtype=F64))
        found = found._replace(scores=torch.randn_like(found.scores), sides=torch.randn_like(found.sides))
    boxes = torch.tensor([[[4.0, 6, 60, 50], [20, 10, 90, 60], [0, 0, 0, 0]], [[30, 20, 45, 61], [0, 0, 0, 0], [0, 0, 0, 0]]], dtype=F64)
    labels = torch.tensor([[2, 0, -1], [1, -1, -1]])
    which, _ = assigned(found, boxes, labels, 5)
    assert {-1, 0, 1} == set(which[0].tolist()) and {-1, 0} == set(which[1].tolist())
    truth = loss_by_hand(found, boxes, labels, 5)
    return abs(float(detection_loss(found, boxes, labels, top=5)) - truth), abs(
        float(detection_loss(found, boxes, labels, top=1000)) - truth
    )


@check(
    "mamba-yolo",
    "share of squares and discs that a net of one scale, trained for 150 steps, finds (F1 at overlap 0.5, class right)",
    above=0.75,
    control="its boxes with equal sides",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    net, generator = MambaYOLOMini(2, state=4), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=150)
    for _ in range(150):
        x, (boxes, kinds) = scenes(16, generator)
        optimizer.zero_grad()
        detection_loss(net(x), boxes, kinds).backward()
        optimizer.step()
        schedule.step()

    def f1() -> float:
        x, (boxes, kinds) = scenes(100, torch.Generator().manual_seed(1))
        with torch.no_grad():
            found = detections(net(x))
        right = 0
        for one, true, kind in zip(found, boxes.tolist(), kinds.tolist(), strict=True):
            for box, label in zip(true, kind, strict=True):
                mine = [complete_overlap(box, b, False) for b, k in zip(one.boxes.tolist(), one.labels.tolist(), strict=True) if k == label]
                right += max(mine, default=0) > 0.5
        return 2 * right / (sum(len(one.labels) for one in found) + int((kinds >= 0).sum()))

    net.eval()
    trained = f1()
    last: Any = net.head.sides[0]
    for values in last[-1].parameters():
        torch.nn.init.zeros_(values)
    return trained, f1()
