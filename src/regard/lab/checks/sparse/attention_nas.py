"""Checks of attention-nas."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.search.ranker import PairwiseRanker
from regard.search.space import Arch, LayerArch, Space, flops
from regard.search.supernet import SuperNet
from regard.zoo.sparse.attention_nas import accuracy, attention_search, evolve, train


@check("attention-nas", "cosFormer's linear form equals its weights, causal or not", below=1e-10, control="weights without the cosine")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 60, 8, dtype=F64) for _ in range(3))
    at = torch.arange(60, dtype=F64)
    near = torch.cos(math.pi / 2 * (at[:, None] - at) / 64)
    own, other = 0.0, math.inf
    for causal in (True, False):
        found = attend(q, k, v, get("cosformer", horizon=64.0), mask=Causal() if causal else None)
        w = torch.relu(q) @ torch.relu(k).transpose(-1, -2) * (torch.ones(60, 60, dtype=F64).tril() if causal else 1.0)
        truths = [x / x.sum(-1, keepdim=True).clamp_min(1e-30) @ v for x in (w * near, w)]
        own, other = max(own, naive.gap(found, truths[0])), min(other, naive.gap(found, truths[1]))
    return own, other


def small_space() -> Space:
    """16 architectures: two layers of softmax or cosFormer, two widths of MLP each."""
    return Space(("softmax", "cosformer"), (2,), (16,), (2,), (16, 32))


def simulated(arch: Arch) -> float:
    """Additive effects, and a tenth of them as an interaction of the two layers."""
    gain = [{"softmax": 1.0, "cosformer": 0.6}[one.attention] + one.hidden / 40 for one in arch.layers]
    both = arch.layers[0].attention != arch.layers[1].attention
    return 1.5 * gain[0] + gain[1] + 0.35 * both


@check(
    "attention-nas",
    "16 architectures, half of the pairs: Kendall's tau on the other half",
    above=0.7,
    control="labels of the pairs drawn by coin",
)
def _() -> tuple[float, float]:
    archs = list(small_space().every())
    values, features = [simulated(a) for a in archs], torch.tensor([small_space().features(a) for a in archs])
    pairs = [(a, b) for a in range(16) for b in range(a)]
    draw, found = random.Random(0), []
    draw.shuffle(pairs)
    for honest in (True, False):
        turned = [(a, b) if (values[a] > values[b] if honest else draw.random() < 0.5) else (b, a) for a, b in pairs]
        ranker = PairwiseRanker(features.shape[1])
        ranker.fit(features, turned[:60])
        with torch.no_grad():
            scores = ranker(features).tolist()
        signs = [math.copysign(1, (scores[a] - scores[b]) * (values[a] - values[b])) for a, b in pairs[60:]]
        found.append(sum(signs) / len(signs))
    return found[0], found[1]


@check(
    "attention-nas",
    "search under four budgets: value of the brute-force optimum less that of the architecture found",
    below=0,
    control="the dearest affordable architecture",
)
def _() -> tuple[float, float]:
    space, own, other = small_space(), 0.0, 0.0
    archs = list(space.every())
    costs = sorted({flops(a, 64) for a in archs})
    for budget in costs[1::3][:4]:
        possible = [a for a in archs if flops(a, 64) <= budget]
        best = max(simulated(a) for a in possible)
        found = evolve(space, simulated, budget, 64)
        own = max(own, best - simulated(found) + (flops(found, 64) > budget))
        other = max(other, best - simulated(min(possible, key=lambda a: (-flops(a, 64), simulated(a)))))
    return own, other


@check(
    "attention-nas",
    "12 sampled architectures: the super-net equals a net of its own with the slices",
    below=1e-10,
    control="the other kind of attention in every layer",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    space, draw = Space(depths=(1, 2, 3), dims=(16, 32), heads=(2, 4), hiddens=(16, 32)), random.Random(0)
    net, tokens = SuperNet(space, 20, 7, 32).double(), torch.randint(20, (2, 24))
    own, other = 0.0, math.inf
    for _ in range(12):
        arch = space.sample(draw)
        truth = net.standalone(arch)(tokens, arch)
        swapped = Arch(
            arch.dim,
            tuple(LayerArch("cosformer" if x.attention == "softmax" else "softmax", x.heads, x.hidden) for x in arch.layers),
        )
        own, other = max(own, naive.gap(net(tokens, arch), truth)), min(other, naive.gap(net(tokens, swapped), truth))
    return own, other


@check(
    "attention-nas",
    "FLOPs of 6 architectures: projections and MLP as torch counts them, and mixing by hand (2 L^2 d, or 4 L d d_head): largest difference",
    below=0,
    control="every layer counted as softmax",
)
def _() -> tuple[float, float]:
    space, draw = Space(depths=(1, 2, 3), dims=(16, 32), heads=(2, 4), hiddens=(16, 48)), random.Random(3)
    net, own, other = SuperNet(space, 20, 7, 32), 0.0, 0.0
    for _ in range(6):
        arch = space.sample(draw)
        with FlopCounterMode(display=False) as counter:
            net(torch.randint(20, (1, 24)), arch)
        d = arch.dim
        maps = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        ran = maps / 2 - 24 * d * 7  # multiply-adds of linear maps, without the classifier
        mixing = [2 * 24 * 24 * d if one.attention == "softmax" else 4 * 24 * d * d // one.heads for one in arch.layers]
        own = max(own, abs(flops(arch, 24) - ran - sum(mixing)))
        other = max(other, abs(flops(arch, 24) - ran - 2 * 24 * 24 * d * len(arch.layers)))
    return own, other


def worth(arch: Arch) -> float:
    """A made-up value: later layers count more, softmax and wide MLPs help, and the first two layers should differ."""
    layers = sum((n + 1) * (0.5 * (one.attention == "softmax") + 0.4 * one.hidden / 64) for n, one in enumerate(arch.layers))
    return arch.dim / 64 + layers + 0.5 * (arch.layers[0].attention != arch.layers[1].attention)


@check(
    "attention-nas",
    "2592 architectures, half of them affordable: the best one's value less that of the architecture found, mean of 5 searches",
    below=0.1,
    control="the best of as many architectures drawn at random",
)
def _() -> tuple[float, float]:
    space = Space(("softmax", "cosformer"), (4,), (16, 32), (2,), (16, 32, 64))
    costs = {arch: flops(arch, 32) for arch in space.every()}
    budget = sorted(costs.values())[len(costs) // 2]
    best, own, other = max(worth(arch) for arch, cost in costs.items() if cost <= budget), 0.0, 0.0
    for seed in range(5):
        seen: set[Arch] = set()

        def fitness(arch: Arch, seen: set[Arch] = seen) -> float:
            seen.add(arch)
            return worth(arch)

        found = evolve(space, fitness, budget, 32, population=16, rounds=20, seed=seed)
        draw = random.Random(seed)
        affordable = [arch for arch in (space.sample(draw) for _ in range(20 * len(seen))) if costs[arch] <= budget]
        own += (best - worth(found)) / 5 if costs[found] <= budget else math.inf
        other += (best - max(map(worth, affordable[: len(seen)]))) / 5
    return own, other


def reversal(step: int) -> tuple[Tensor, Tensor]:
    """A toy translation: another alphabet, read from the end."""
    generator = torch.Generator().manual_seed(step + 2)
    tokens = torch.randint(6, (32, 6), generator=generator)
    return tokens, (tokens.flip(1) * 5 + 3) % 6


TOY = Space(depths=(1, 2), dims=(32,), heads=(2,), hiddens=(32, 64))


@check(
    "attention-nas",
    "a super-net trained on one random architecture a step: accuracy of the worst of the 20 with inherited weights",
    above=0.6,
    control="as many steps of the largest architecture alone",
)
def _() -> tuple[float, float]:
    found, archs = [], list(TOY.every())
    for sampled in (True, False):
        torch.manual_seed(0)
        draw, net = random.Random(0), SuperNet(TOY, 6, 6, 6)
        choose = (lambda draw=draw: TOY.sample(draw)) if sampled else (lambda: archs[-1])
        train(net, reversal, 150, choose, 1e-2)
        found.append(min(accuracy(net, arch, reversal(-1)) for arch in archs))
    return found[0], found[1]


@check(
    "attention-nas",
    "a toy translation searched end to end under 0.8 of the dearest net: accuracy of the net found, trained from scratch",
    above=0.9,
    control="nets that no step has trained",
)
def _() -> tuple[float, float]:
    budget = 0.8 * max(flops(a, 6) for a in TOY.every())
    found = attention_search(TOY, reversal, 6, 6, 6, budget, steps=60, scored=10, final_steps=150, lr=1e-2)
    untrained = attention_search(TOY, reversal, 6, 6, 6, budget, steps=0, scored=10, final_steps=0)
    told = found.cost == flops(found.best, 6) <= budget and set(found.baselines) == {"softmax", "cosformer"}
    return found.accuracy if told else 0.0, untrained.accuracy
