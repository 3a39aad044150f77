"""Checks of hylra."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from regard.engine.policy import Heads
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layer_plans import cost_of, small
from regard.lab.verification import check
from regard.zoo.sparse.hylra import ReusedIndices, ReuseLayers, ReusePlan, plan, profile


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


def reused_loop(layers: list[Heads], modes: tuple[int | None, ...], count: int, block: int, sinks: int, recent: int) -> list[Tensor]:
    """Heads' outputs of each layer on one prompt: full layers rank keys by a block's whole weights, reuse layers read the ranked ones, and the
    block's own tokens."""
    outs: list[Tensor] = []
    chosen: dict[tuple[int, int, int], set[int]] = {}
    for number, (q, k, v) in enumerate(layers):
        out = torch.zeros_like(q)
        share = q.shape[1] // k.shape[1]
        for start in range(0, q.shape[2], block):
            stop = min(start + block, q.shape[2])
            for g in range(k.shape[1]):
                mass = torch.zeros(stop, dtype=F64)
                for h in range(g * share, (g + 1) * share):
                    for i in range(start, stop):
                        mode = modes[number]
                        seen = list(range(i + 1)) if mode is None else sorted(j for j in chosen[mode, start, g] if j <= i)
                        p = (k[0, g, seen] @ q[0, h, i] / q.shape[-1] ** 0.5).softmax(0)
                        out[0, h, i] = p @ v[0, g, seen]
                        mass[seen] += p
                if modes[number] is None:
                    mass[: min(sinks, count // 4)] = float("inf")
                    mass[stop - min(recent, max(1, count // 2)) :] = float("inf")
                    best = set(mass.argsort(descending=True)[: min(count, stop)].tolist())
                    chosen[number, start, g] = best | set(range(start, stop))
        outs.append(out)
    return outs


@check(
    "hylra",
    "prompts in blocks equal a loop: keys ranked by a block's weights summed over a group, first and last ones in, read by the layers after",
    below=1e-10,
    control="keys of the other full layer",
)
def _() -> tuple[float, float]:
    layers = [tuple(torch.randn(1, h, 50, 8, dtype=F64) * (2 if h == 4 else 1) for h in (4, 2, 2)) for _ in range(4)]
    own = 0.0
    for count, sinks, recent, block in ((12, 4, 16, 16), (9, 1, 2, 7)):
        runs = []
        for modes in ((None, 0, None, 2), (None, 0, None, 0)):
            policy = ReuseLayers(ReusePlan(modes, 0.0), count, block=block, sinks=sinks, recent=recent)
            own += policy.reads != [0, 0, 0, 0]
            runs.append([policy.prompt(n, *x) for n, x in enumerate(layers)])
        truth = reused_loop(layers, (None, 0, None, 2), count, block, sinks, recent)  # type: ignore[arg-type]
        own = max(own, *(naive.gap(a, b) for a, b in zip(runs[0], truth, strict=True)))
    return own, naive.gap(runs[1][3], truth[3])


@check(
    "hylra",
    "a profile equals loops over layers and rows: overlap of the largest keys, their mass, the relative error of reading them; calibration plans by it",
    below=1e-10,
    control="overlap in place of mass",
)
def _() -> tuple[float, float]:
    layers = [tuple(torch.randn(1, h, 24, 8, dtype=F64) * 2 for h in (4, 2, 2)) for _ in range(3)]
    found, own = profile(layers, 5), 0.0  # type: ignore[arg-type]

    def weights(n: int, h: int, i: int) -> Tensor:
        return (layers[n][1][0, h // 2, : i + 1] @ layers[n][0][0, h, i] / 8**0.5).softmax(0)

    for a in range(3):
        for n in range(a, 3):
            sums = [0.0, 0.0, 0.0]
            for i in range(5, 24):
                for g in range(2):
                    tops = [set((weights(m, 2 * g, i) + weights(m, 2 * g + 1, i)).topk(5).indices.tolist()) for m in (a, n)]
                    sums[0] += len(tops[0] & tops[1]) / 5 / (19 * 2)
                    for h in (2 * g, 2 * g + 1):
                        p, kept, v = weights(n, h, i), sorted(tops[0]), layers[n][2][0, g]
                        whole, some = p @ v[: i + 1], p[kept] @ v[kept] / p[kept].sum()
                        sums[1] += float(p[kept].sum()) / (19 * 4)
                        sums[2] += float((some - whole).norm() / whole.norm()) / (19 * 4)
            got = [float(x[a, n]) for x in (found.overlap, found.mass, found.error)]
            own = max(own, *(abs(x - y) for x, y in zip(got, sums, strict=True)))
    own += float((found.sensitivity != found.error.diagonal()).sum())
    policy = ReuseLayers(None, 5, weight=0.02)
    policy.calibrate(layers)  # type: ignore[arg-type]
    own += policy.modes != plan(found.error, found.sensitivity, weight=0.02).modes or policy.reads != [0, 0, 0]
    return own, float((found.overlap - found.mass).abs().max())
