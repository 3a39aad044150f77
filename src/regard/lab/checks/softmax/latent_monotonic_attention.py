"""Checks of latent-monotonic-attention."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax.latent_monotonic_attention import MonotonicDecoder, full_sum, jump_scores, sample_positions, stretched, viterbi


@check(
    "latent-monotonic-attention",
    "T = 7, S = 3: the forward sum == all 35 alignments, Viterbi == the best of them",
    below=1e-10,
    control="positions that may stand still",
)
def _() -> tuple[float, float]:
    u, labels = torch.randn(7, dtype=F64), torch.randn(3, 7, dtype=F64)
    jumps = jump_scores(u)
    stop = torch.sigmoid(u)

    def probability(path: tuple[int, ...]) -> float:
        log, last = 0.0, -1
        for s, t in enumerate(path):
            log += math.log(float(stop[t])) + sum(math.log(1 - float(stop[x])) for x in range(last + 1, t)) + float(labels[s, t])
            last = t
        return log

    paths = list(itertools.combinations(range(7), 3))
    found = torch.tensor([probability(path) for path in paths], dtype=F64)
    best, value = viterbi(jumps, labels)
    right = tuple(best.tolist()) == paths[int(found.argmax())]
    own = max(abs(float(full_sum(jumps, labels) - torch.logsumexp(found, 0))), abs(float(value - found.max())))
    loose = torch.tensor([probability(p) for p in itertools.combinations_with_replacement(range(7), 3)], dtype=F64)
    return own if right and len(paths) == 35 else math.inf, abs(float(full_sum(jumps, labels) - torch.logsumexp(loose, 0)))


@check(
    "latent-monotonic-attention",
    "1000 drawn and decoded alignments: steps that do not move forward",
    below=0.0,
    control="independent soft attention's arg maxima",
)
def _() -> tuple[float, float]:
    drawn = sample_positions(torch.randn(1000, 12), 5)
    decoded = MonotonicDecoder(6, 5, 16).decode(torch.randn(4, 12, 6), 5)[1]
    free = torch.randn(1000, 5, 12).argmax(-1)
    return float(sum(int((x.diff(dim=-1) <= 0).sum()) for x in (drawn, decoded))), float((free.diff(dim=-1) <= 0).sum())


@check("latent-monotonic-attention", "windows of width >= T == global attention, of width 0 == the frame", below=1e-12, control="width 2")
def _() -> tuple[float, float]:
    model = MonotonicDecoder(6, 5, 16, "window").double()
    x, at = torch.randn(2, 12, 6, dtype=F64), torch.tensor([[2, 5, 9], [0, 7, 11]])
    h, _ = model.encode(x)
    before = at - 1

    def context(kind: str, width: int = 0) -> Tensor:
        model.context, model.width = kind, width
        return model.contexts(h, before, at)

    wide, one, whole, frame = context("window", 12), context("window", 0), context("global"), context("hard")
    return max(naive.gap(wide, whole), naive.gap(one, frame)), naive.gap(context("window", 2), whole)


@check(
    "latent-monotonic-attention",
    "stretched symbols: label accuracy of the segmental model, where the median error of alignments is <= 1 frame",
    above=0.9,
    control="untrained",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    model = MonotonicDecoder(6, 5, 32, "segment")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def accuracy() -> float:
        test, labels, last = stretched(64, seed=1)
        found, places = model.decode(test, 4)
        first = torch.nn.functional.pad(last[:, :-1] + 1, (1, 0))
        off = torch.maximum((first - places).clamp_min(0), (places - last).clamp_min(0))  # frames outside the symbol's own span
        return float((found == labels).float().mean()) if float(off.float().median()) <= 1 else 0.0

    before = accuracy()
    for step in range(350):
        x, y, _ = stretched(64, seed=100 + step)
        loss = -model(x, y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return accuracy(), before
