"""Checks of little-attention-block."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import flops, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import depthwise, image
from regard.lab.verification import check
from regard.nn.images.slot_net import SlotNet
from regard.nn.retrieval import retrieval_scores, triplet_batch_hard
from regard.tasks.identities import patterns, tracks
from regard.zoo.vision.little_attention_block import LiteAttention, NonLocal, latency_overhead, placement_search


@check(
    "little-attention-block",
    "values and gradients of the block, of odd sizes == by hand; 1.25 x at first",
    below=1e-12,
    control="without the residual",
)
def _() -> tuple[float, float]:
    fresh, layer, x = LiteAttention(8, 2).double(), drawn(LiteAttention(8, 2, 5)), image(2, 8, 5, 7)
    first, _, last = layer.over_channels
    h = (x.mean((2, 3)) @ first.weight.T + first.bias).clamp_min(0)  # type: ignore[operator]
    c = 1 / (1 + torch.exp(-(h @ last.weight.T + last.bias)))[..., None, None]  # type: ignore[operator]
    one, wide = layer.over_pixels
    s = (one.weight[0, :, 0, 0, None, None] * x).sum(1, keepdim=True) + one.bias  # type: ignore[index, operator]
    s = 1 / (1 + torch.exp(-depthwise(s, wide.weight, wide.bias)))  # type: ignore[arg-type]
    gaps = [gap_with_gradients(layer(x), x + x * c * s, (x, *layer.parameters())), naive.gap(fresh(x), 1.25 * x)]
    return max(gaps), naive.gap(layer(x), x * c * s)


@check(
    "little-attention-block", "products of its layers as counted in a run, off the closed form", below=0.0, control="a non-local block's"
)
def _() -> tuple[float, float]:
    layer, x = LiteAttention(64), torch.randn(1, 64, 12, 6)
    counts = [flops(functools.partial(block, x)) / 2 for block in (layer, NonLocal(64))]
    return abs(counts[0] - layer.products(12, 6)), abs(counts[1] - layer.products(12, 6))


@check(
    "little-attention-block",
    "time over a bottleneck's, batch 1, 256 channels, 32 x 16, over that of the non-local block (medians of 30 runs)",
    below=1 / 3,
    control="the non-local block",
)
def _() -> tuple[float, float]:
    convs = [nn.Conv2d(256, 64, 1, bias=False), nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.Conv2d(64, 256, 1, bias=False)]
    bottleneck = nn.Sequential(*[part for conv in convs for part in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())])
    shape = (1, 256, 32, 16)
    own, other, again = (latency_overhead(block, bottleneck, shape) for block in (LiteAttention(256), NonLocal(256), NonLocal(256)))
    return own / other, again / other


class Planted(nn.Module):
    def __init__(self, slots: tuple[int, ...]):
        super().__init__()
        self.slots = slots


@check(
    "little-attention-block",
    "placements of a planted table of four slots that are not its Pareto set, within a budget and without",
    below=0.0,
    control="the best by score alone",
)
def _() -> tuple[float, float]:
    gain, cost = (3.0, 1.0, 2.0, -1.0), (2.0, 0.5, 3.0, 1.0)

    def score(model: nn.Module) -> float:
        assert isinstance(model, Planted)
        return sum(gain[i] for i in model.slots) - (2.5 if {0, 2} <= set(model.slots) else 0)

    def latency(model: nn.Module) -> float:
        assert isinstance(model, Planted)
        return sum(cost[i] for i in model.slots)

    subsets = [c for n in range(5) for c in itertools.combinations(range(4), n)]
    table = {c: (score(Planted(c)), latency(Planted(c))) for c in subsets}
    wrong, other = 0, 0
    for budget in (float("inf"), 3.0):
        inside = {c: v for c, v in table.items() if v[1] <= budget}
        best = {c for c, (s, t) in inside.items() if not any(a >= s and b <= t and (a, b) != (s, t) for a, b in inside.values())}
        found = {one.slots for one in placement_search(Planted, 4, score, latency, budget)}
        wrong, other = wrong + len(found ^ best), other + len({max(inside, key=lambda c: inside[c][0])} ^ best)
    return float(wrong), float(other)


def new_identities(steps: int, seed: int = 0) -> float:
    """Mean average precision on identities not trained on, of a small net with the block in both places."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, head = SlotNet(3, 32, lambda width: LiteAttention(width, 4)), nn.Linear(32, 24)
    optimizer, looks = torch.optim.Adam([*net.parameters(), *head.parameters()], 3e-3), patterns(24, generator)
    for _ in range(steps):
        x, y, _ = tracks(looks, 2, generator, frames=1, empty=0)
        features = net(x[:, 0])
        optimizer.zero_grad()
        (F.cross_entropy(head(features), y) + triplet_batch_hard(features, y)).backward()
        optimizer.step()
    fresh = patterns(60, generator)
    (x, y, _), (g, z, _) = (tracks(fresh, each, generator, frames=1, empty=0) for each in (1, 3))
    with torch.no_grad():
        net.eval()
        return retrieval_scores(net(x[:, 0]), y, net(g[:, 0]), z)["map"]


@check(
    "little-attention-block",
    "mean average precision on new identities, block in a small re-identification net, 80 steps",
    above=0.6,
    control="untrained",
)
def _() -> tuple[float, float]:
    return new_identities(80), new_identities(1)
