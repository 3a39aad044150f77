"""Checks of attention-cl."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import image
from regard.lab.verification import check
from regard.nn.retrieval import CentreLoss, retrieval_scores, triplet_batch_hard
from regard.tasks.identities import patterns, tracks
from regard.zoo.vision.attention_cl import ClipReID, OSMCAALoss, TemporalAttentionPool, attention_cl_loss


@check(
    "attention-cl",
    "values and gradients of pooled clips and weights, softmax and sigmoid, 4 x 3 maps == frame by frame",
    below=1e-11,
    control="the mean over frames",
)
def _() -> tuple[float, float]:
    gaps, x = [], image(2, 5, 6, 4, 3)
    for kind in ("softmax", "sigmoid"):
        layer = drawn(TemporalAttentionPool(6, 7, (4, 3), kind), 0.1)
        assert layer.conv.bias is not None and layer.over_time.bias is not None
        seen = torch.stack([((x[:, t, None] * layer.conv.weight).sum((2, 3, 4)) + layer.conv.bias).clamp_min(0) for t in range(5)], 1)
        wide = torch.nn.functional.pad(seen, (0, 0, 1, 1))
        taps = layer.over_time.weight[0]
        s = torch.stack([(wide[:, t : t + 3].mT * taps).sum((1, 2)) + layer.over_time.bias for t in range(5)], 1).clamp_min(0)
        e = s.exp() if kind == "softmax" else 1 / (1 + torch.exp(-s))
        weights = e / e.sum(1, keepdim=True)
        clips = sum(weights[:, t, None] * x[:, t].mean((2, 3)) for t in range(5))
        found = layer(x)
        gaps.append(naive.gap(found[1], weights))
        gaps.append(gap_with_gradients(found[0], clips, (x, *layer.parameters())))  # type: ignore[arg-type]
    return max(gaps), naive.gap(found[0], x.mean((1, 3, 4)))


def mined(x: Tensor, labels: Tensor, vectors: Tensor, loss: OSMCAALoss, unit: bool = True) -> Tensor:
    x = x / x.norm(dim=1, keepdim=True)
    c = vectors / vectors.norm(dim=0) if unit else vectors
    own = [torch.exp(x[i] @ c)[labels[i]] / torch.exp(x[i] @ c).sum() for i in range(len(x))]
    sums: list[Tensor] = [torch.zeros((), dtype=F64) for _ in range(4)]
    for i in range(len(x)):
        for j in range(len(x)):
            if i == j:
                continue
            d = (x[i] - x[j]).norm()
            least = torch.minimum(own[i], own[j])
            if labels[i] == labels[j]:
                w = torch.exp(-(d**2) / loss.sigma**2) * least
                sums[0], sums[1] = sums[0] + w * d**2, sums[1] + w
            else:
                gap = (loss.alpha - d).clamp_min(0)
                sums[2], sums[3] = sums[2] + gap * least * gap**2, sums[3] + gap * least
    return (1 - loss.share) * sums[0] / sums[1] / 2 + loss.share * sums[2] / sums[3] / 2


@check(
    "attention-cl",
    "values and gradients of OSM-CAA, other constants too == a double loop over pairs",
    below=1e-9,
    control="class vectors of any length",
)
def _() -> tuple[float, float]:
    labels, gaps = torch.arange(12) % 4, []
    for loss in (OSMCAALoss(), OSMCAALoss(0.9, 0.3, 0.5)):
        x, vectors = (1 + 0.7 * torch.randn(12, 16, dtype=F64)).requires_grad_(), image(16, 4)
        gaps.append(gap_with_gradients(loss(x, labels, vectors), mined(x, labels, vectors, loss), (x, vectors)))
    return max(gaps), naive.gap(loss(x, labels, vectors), mined(x, labels, 3 * vectors, loss, unit=False))


@check(
    "attention-cl",
    "centre and triplet losses and the sum of all four, values and gradients == loops over the batch",
    below=1e-9,
    control="the triplet of nearest positives",
)
def _() -> tuple[float, float]:
    x, logits, labels, centres = image(8, 6), image(8, 4), torch.arange(8) % 4, CentreLoss(4, 6).to(F64)

    def triplet(cosine: bool, hardest: bool = True) -> Tensor:
        terms = []
        for i in range(8):
            far = [-(x[i] @ y) / (x[i].norm() * y.norm()) if cosine else (x[i] - y).square().sum().clamp_min(1e-12).sqrt() for y in x]
            positive = torch.stack([f for f, label in zip(far, labels, strict=True) if label == labels[i]])
            negative = torch.stack([f for f, label in zip(far, labels, strict=True) if label != labels[i]])
            terms.append((0.3 + (positive.max() if hardest else positive.min()) - negative.min()).clamp_min(0))
        return torch.stack(terms).mean()

    centre = torch.stack([(x[i] - centres.centres[labels[i]]).square().sum() for i in range(8)]).mean()
    target = torch.full((8, 4), 0.1 / 4, dtype=F64) + 0.9 * torch.nn.functional.one_hot(labels, 4).to(F64)
    ce = -(target * logits.log_softmax(1)).sum(1).mean()
    mining = OSMCAALoss()
    total = ce + 0.7 * triplet(True) + 5e-4 * centre + 0.3 * mined(x, labels, centres.centres.T, mining)
    leaves = (x, logits, centres.centres)
    found = attention_cl_loss(x, logits, labels, centres, centres.centres.T, mining, beta=0.3)
    gaps = [gap_with_gradients(found, total, leaves), naive.gap(triplet_batch_hard(x, labels, cosine=False), triplet(False))]
    return max(gaps), naive.gap(triplet_batch_hard(x, labels), triplet(True, hardest=False))


@check(
    "attention-cl",
    "gradient that the mined pairs give to centres where the classifier's columns weigh them",
    below=0.0,
    control="in the CL form",
)
def _() -> tuple[float, float]:
    x, labels, centres, columns = image(8, 6), torch.arange(8) % 4, CentreLoss(4, 6).to(F64), image(6, 4)

    def felt(vectors: Tensor) -> float:
        found = torch.autograd.grad(OSMCAALoss()(x, labels, vectors), centres.centres, allow_unused=True)[0]
        return 0.0 if found is None else float(found.abs().max())

    return felt(columns), felt(centres.centres.T)


NOISE = 0.7


def trained_on_tracks(attention: bool, seed: int) -> tuple[float, float]:
    """(weight on empty frames, mean average precision on new identities)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    base = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU()
    )
    pool = TemporalAttentionPool(32, 32, (4, 4)) if attention else None
    if pool is not None:
        nn.init.ones_(pool.over_time.bias)  # type: ignore[arg-type]  # else its last ReLU is closed from the start in half of the runs
    net = ClipReID(base, 32, 24, pool)
    centres, mining, looks = CentreLoss(24, 32), OSMCAALoss(), patterns(24, generator)
    optimizer, slow = torch.optim.Adam(net.parameters(), 3e-3), torch.optim.SGD(centres.parameters(), 0.5)
    for _ in range(120):
        x, y, _ = tracks(looks, 2, generator, noise=NOISE)
        features, logits, _ = net(x)
        optimizer.zero_grad()
        slow.zero_grad()
        attention_cl_loss(features, logits, y, centres, centres.centres.T, mining).backward()
        optimizer.step()
        centres.rescale(5e-4)
        slow.step()
    fresh = patterns(60, generator)
    (x, y, bare), (g, z, _) = tracks(fresh, 1, generator, noise=NOISE), tracks(fresh, 3, generator, noise=NOISE)
    with torch.no_grad():
        found, gallery = net.eval()(x), net(g)
    return float((found[2] * bare).sum(1).mean()), retrieval_scores(found[0], y, gallery[0], z)["map"]


@check(
    "attention-cl",
    "weight on the two empty frames of four, mean of 3 seeds (mean average precision less than 3 points above mean pooling's counts as 1)",
    below=0.25,
    control="mean pooling",
)
def _() -> tuple[float, float]:
    runs = [(trained_on_tracks(True, seed), trained_on_tracks(False, seed)) for seed in range(3)]
    gain = statistics.mean(own[1] - plain[1] for own, plain in runs)
    return (statistics.mean(own[0] for own, _ in runs) if gain >= 0.03 else 1.0), statistics.mean(plain[0] for _, plain in runs)
