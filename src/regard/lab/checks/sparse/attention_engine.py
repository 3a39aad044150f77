"""Checks of attention-engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regard.engine.online import Rows, Schedule, Tiles
from regard.lab import naive
from regard.lab.verification import check
from regard.zoo.sparse.attention_engine import Plain, Retention, attention_engine, linear_attention_engine

F64, LENGTH = torch.float64, 173


class PowerNorm:
    """A user's own: weights S / (sum |S|^p)^(1/p)."""

    masked, state = 0.0, {"r": 0.0}

    def __init__(self, power: float = 3.0):
        self.power = power

    def online(self, scores: Tensor, state: Rows) -> tuple[Tensor, Rows, float]:
        return scores, {"r": state["r"] + scores.abs().pow(self.power).sum(-1, keepdim=True)}, 1.0

    def epilogue(self, out: Tensor, state: Rows) -> tuple[Tensor, Rows]:
        n = state["r"].pow(1 / self.power)
        return out / n, {"n": n}

    def normalised(self, scores: Tensor, final: Rows) -> Tensor:
        return scores / final["n"]

    def gradient(self, dp: Tensor, p: Tensor, scores: Tensor, final: Rows, delta: Tensor) -> Tensor:
        slope = (scores.abs() / final["n"]).pow(self.power - 1) * scores.sign()
        return (dp - delta * slope) / final["n"]


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def windowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < 40)


Naive = Callable[[Tensor, Tensor, Tensor], Tensor]  # (s = q k^T / sqrt(D), visible, c) -> weights
DEFINITIONS: dict[str, tuple[object, Naive]] = {
    "soft cap": (
        attention_engine(lambda s, c: c * torch.tanh(s / c), causal, custom_inputs=("c",)),
        lambda s, seen, c: (c * torch.tanh(s / c)).masked_fill(~seen, -math.inf).softmax(-1),
    ),
    "sigmoid": (
        attention_engine(lambda s, c: torch.sigmoid(s * c - math.log(LENGTH)), causal, Plain(), ("c",)),
        lambda s, seen, c: torch.sigmoid(s * c - math.log(LENGTH)) * seen,
    ),
    "relu": (attention_engine(lambda s, c: torch.relu(s + c), causal, Plain(), ("c",)), lambda s, seen, c: torch.relu(s + c) * seen),
    "retention": (
        attention_engine(lambda s, i, j, c: s * torch.sigmoid(c) ** (i - j).clamp(min=0), causal, Retention(), ("c",)),
        lambda s, seen, c: over(s * torch.sigmoid(c) ** steps().clamp(min=0) * seen),
    ),
    "alibi and window": (
        attention_engine(lambda s, i, j, c: s - c * (i - j), windowed, custom_inputs=("c",)),
        lambda s, seen, c: (s - c * steps()).masked_fill(~(seen & (steps() < 40)), -math.inf).softmax(-1),
    ),
    "a new normaliser": (
        attention_engine(lambda s, c: s + c, causal, PowerNorm(), ("c",)),
        lambda s, seen, c: ((s + c) * seen) / ((s + c) * seen).abs().pow(3).sum(-1, keepdim=True).pow(1 / 3),
    ),
}


def steps() -> Tensor:
    at = torch.arange(LENGTH)
    return (at[:, None] - at).double()


def over(s: Tensor) -> Tensor:
    return s / s.abs().sum(-1, keepdim=True).clamp(min=1)


def gaps(gradients: bool, tile: int = 32) -> tuple[float, float]:
    """(largest gap of the six definitions to their formulas, smallest gap to the formula of the next one)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, LENGTH, 16, dtype=F64, requires_grad=True) for h in (4, 2, 2))
    c = torch.full((), 1.7, dtype=F64, requires_grad=True)
    seen, seed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), torch.randn(2, 4, LENGTH, 16, dtype=F64)
    truths, mine = [], []
    for engine, formula in DEFINITIONS.values():
        s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
        truth = formula(s, seen, c) @ v.repeat_interleave(2, 1)
        tiled = attention_engine_with(engine, tile)(q, k, v, c=c)
        pair = (truth, tiled, engine.reference(q, k, v, c=c))  # type: ignore[attr-defined]
        found = [torch.autograd.grad((o * seed).sum(), (q, k, v, c)) if gradients else (o,) for o in pair]
        truths.append(found[0])
        mine += [(len(truths) - 1, one) for one in found[1:]]
    own = max(naive.gap(a, b) for n, one in mine for a, b in zip(one, truths[n], strict=True))
    other = min(naive.gap(mine[2 * n][1][0], truths[n - 1][0]) for n in range(len(truths)))
    return own, other


def attention_engine_with(engine: object, tile: int):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(engine, schedule=Schedule(tile, tile))  # type: ignore[type-var]


@check(
    "attention-engine",
    "six definitions in hooks, one with a normaliser of its own, L = 173 in tiles of 32: outputs equal their formulas",
    below=1e-10,
    control="the next definition's formula",
)
def _() -> tuple[float, float]:
    return gaps(False)


@check(
    "attention-engine",
    "their gradients of q, k, v and the custom tensor equal autograd of the formulas",
    below=1e-9,
    control="the next definition's formula",
)
def _() -> tuple[float, float]:
    return gaps(True)


@check(
    "attention-engine",
    "linear hooks (decay A dt, keys times dt): Mamba-2's step recurrence",
    below=1e-10,
    control="keys not times dt",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(2, 4, 90, 8, dtype=F64) for _ in range(3))
    dt, a = torch.rand(2, 4, 90, dtype=F64), -torch.rand(4, dtype=F64)
    state, rows = torch.zeros(2, 4, 8, 8, dtype=F64), []
    for t in range(90):
        step = dt[:, :, t, None, None]
        state = torch.exp(a[:, None, None] * step) * state + step * k[:, :, t, :, None] * v[:, :, t, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    truth = torch.stack(rows, 2)
    found = []
    for k_mod in (lambda k, dt: k * dt[..., None], lambda k, dt: k):
        run = linear_attention_engine(k_mod=k_mod, decay_mod=lambda g, a: a[:, None] * g)
        found.append(naive.gap(run(q, k, v, decay=dt, dt=dt, a=a), truth))
    return found[0], found[1]


@check(
    "attention-engine",
    "tiles called full, partial and empty, for causal, window and document masks: differing tiles",
    below=0,
    control="the causal mask's tiles for all three",
)
def _() -> tuple[float, float]:
    docs = torch.tensor([0] * 50 + [1] * 70 + [2] * 53)
    masks = (causal, windowed, lambda b, h, i, j: (j <= i) & (docs[i] == docs[j]))
    at = torch.arange(LENGTH)
    wrong = [0, 0]
    causal_truth = None
    for mask in masks:
        seen = mask(torch.zeros(1), torch.zeros(1), at[:, None], at)
        parts = [[seen[i : i + 32, j : j + 32] for j in range(0, LENGTH, 32)] for i in range(0, LENGTH, 32)]
        truth = torch.tensor([[int(p.any()) + int(p.all()) for p in row] for row in parts])
        causal_truth = truth if causal_truth is None else causal_truth
        definition = attention_engine(mask_mod=mask).definition
        from regard.algebra import Sizes

        tiles = Tiles.of(definition, Sizes(1, 1, 1, LENGTH, LENGTH, 8, 8), Schedule(32, 32), 1.0, torch.device("cpu"))
        found = (tiles.some.int() + tiles.every.int())[0, 0]
        wrong[0] += int((found != truth).sum())
        wrong[1] += int((causal_truth != truth).sum())
    return float(wrong[0]), float(wrong[1])
