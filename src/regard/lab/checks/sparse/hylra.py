"""Checks of hylra."""

from __future__ import annotations

import itertools

import torch

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layer_plans import cost_of, small
from regard.lab.verification import check
from regard.zoo.sparse.hylra import ReusedIndices, ReusePlan, plan, profile


@check(
    "hylra",
    "40 random instances of 8 layers: the plan's cost over brute force over 128 mode vectors",
    below=1e-12,
    control="every second layer full",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for _ in range(40):
        error, weight = torch.rand(8, 8, dtype=F64), float(torch.rand(())) * 0.5
        forced = torch.rand(8) < 0.15
        best = min(cost_of((True, *rest), error, weight, forced) for rest in itertools.product((True, False), repeat=7))
        found = plan(error, forced.double(), weight=weight, threshold=0.5)
        own = max(own, abs(found.cost - best), abs(cost_of(tuple(m is None for m in found.modes), error, weight, forced) - best))
        other = max(other, min(cost_of((True, False) * 4, error, weight, forced), 9.0) - best)
    return own, other


@check(
    "hylra",
    "count >= length, and a plan of full layers: logits of the dense model, in prompts and in decoding",
    below=1e-10,
    control="count 12 of 60 keys",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, tokens = small(), torch.randint(40, (2, 60))
    dense = model(tokens)

    def gap(modes: tuple[int | None, ...], count: int) -> float:
        runner = ReusedIndices(model, ReusePlan(modes, 0.0), count, block=16)
        first, state = runner.step(tokens[:, :40])
        outs = [first]
        for t in range(40, 60):
            out, state = runner.step(tokens[:, t : t + 1], state)
            outs.append(out)
        return max(naive.gap(torch.cat(outs, 1), dense), naive.gap(runner(tokens), dense))

    return max(gap((None, 0, None, 2), 64), gap((None,) * 4, 4)), gap((None, 0, 0, 0), 12)


@check("hylra", "in decoding reuse layers read exactly `count` entries: layers that do not", below=0, control="a plan of full layers")
@torch.no_grad()
def _() -> tuple[float, float]:
    model, tokens, wrong = small(), torch.randint(40, (1, 61)), []
    for modes in ((None, 0, None, 2), (None,) * 4):
        runner = ReusedIndices(model, ReusePlan(modes, 0.0), 20)
        _, state = runner.step(tokens[:, :60])
        runner.step(tokens[:, 60:], state)
        wrong.append(sum(runner.reads[n] != 20 for n in (1, 3)) + sum(runner.reads[n] != 61 for n in (0, 2)))
    return float(wrong[0]), float(wrong[1])


@check(
    "hylra",
    "6 planted layers, 0-2 and 3-5 alike: full at 0 and 3 only, and less error than the fixed plan 0, 2, 4",
    below=0,
    control="a plan that knows no errors",
)
def _() -> tuple[float, float]:
    base = [torch.randn(1, 2, 128, 16, dtype=F64) * 2 for _ in range(2)]
    k = torch.randn(1, 2, 128, 16, dtype=F64)
    layers = [
        (base[n // 3] + (0.1 if n % 3 else 0.0) * torch.randn(1, 2, 128, 16, dtype=F64), k, torch.randn(1, 2, 128, 16, dtype=F64))
        for n in range(6)
    ]
    found = profile(layers, 12).error
    fixed = sum(float(found[n - 1, n]) for n in (1, 3, 5))
    wrong = []
    for error in (found, torch.full_like(found, 0.3)):
        chosen = plan(error, weight=0.6)
        mine = sum(float(found[mode, n]) for n, mode in enumerate(chosen.modes) if mode is not None)
        wrong.append(float(chosen.full_layers != [0, 3]) + max(0.0, mine - fixed))
    return wrong[0], wrong[1]
