"""Checks of attention-nas."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.search.ranker import PairwiseRanker
from regard.search.space import Arch, LayerArch, Space, flops
from regard.search.supernet import SuperNet
from regard.zoo.sparse.attention_nas import attention_search, evolve


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


def reversal(step: int) -> tuple[Tensor, Tensor]:
    """A toy translation: another alphabet, read from the end."""
    generator = torch.Generator().manual_seed(step + 2)
    tokens = torch.randint(12, (32, 12), generator=generator)
    return tokens, (tokens.flip(1) * 5 + 3) % 12


@check(
    "attention-nas",
    "a toy translation searched end to end under 0.8 of the dearest net: accuracy of the net found, trained from scratch",
    above=0.5,
    control="nets that no step has trained",
)
def _() -> tuple[float, float]:
    space = Space(depths=(1, 2), dims=(32,), heads=(2,), hiddens=(32, 64))
    dearest = max(flops(a, 12) for a in space.every())
    found = attention_search(space, reversal, 12, 12, 12, 0.8 * dearest, steps=60, scored=10, final_steps=400)
    untrained = attention_search(space, reversal, 12, 12, 12, 0.8 * dearest, steps=0, scored=10, final_steps=0)
    return (found.accuracy if found.cost <= 0.8 * dearest else 0.0), untrained.accuracy
