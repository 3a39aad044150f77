"""CAB: one comparison of attentions in four patterns, on seven tasks (id 212; Zhang et al., 2023).

patterns: noncausal self, causal self, noncausal cross, causal cross; a mechanism runs in those that it supports (`regard.nn.pattern_net`)
compositional index of a pattern: mean over its tasks of the mean over their measures of w (x - mu) / sigma, w = 1 where higher is better, else -1
efficiency length: n* = (-(b - d) + sqrt((b - d)^2 - 4 a (c - e))) / (2 a), of vanilla's cost a n^2 + b n + c and the other's d n + e
benefit of attention: w (x - x of the net without attention);  extrapolation: perplexity at 1/2, 1, 2, 4 times the trained length
The tasks are small drawn stand-ins (`regard.tasks.long_sequences`), not the paper's data; frames are compared as they stand, without time warping.
Not built: the paper's backbones (FastSpeech 2, Informer, PoinTr, SR3, ...); one small encoder-decoder serves all tasks.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.pattern_net import PATTERNS, REMOVED, PatternNet, Vanilla, layer_of, supported
from regard.tasks.long_sequences import Task, language, tasks
from regard.tasks.pattern_scores import PatternReport, benefit, compositional_index, efficiency_length, pattern_correlation
from regard.tasks.training import fit

Peak = Callable[[Callable[[], Any]], int]


def trained(
    spec: str, task: Task, pattern: str, seed: int, steps: int, batch: int, lr: float, context_len: int, **sizes: int
) -> PatternNet:
    """The net with `spec` in the slot of `pattern`, trained; its other slots hold softmax."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        slots = {**({} if task.own else {"causal self": ""}), pattern: spec}
        net = PatternNet(task.source, task.target, task.outputs, slots, context_len=context_len, **sizes)
        fit(net, lambda g: task.draw(batch, g), lambda b: task.loss(net(b.source, b.target), b), steps, lr=lr, seed=seed)
    return net


@torch.no_grad()
def measured(net: PatternNet, task: Task, count: int) -> dict[str, float]:
    """The task's measures on `count` samples of a seed that training does not use."""
    data = task.draw(count, torch.Generator().manual_seed(2**31))
    out = net(data.source, data.target)
    return {name: measure(out, data) for name, (measure, _) in task.measures.items()}


def mean(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}


@torch.no_grad()
def costs(spec: str, pattern: str, lengths: Sequence[int], dim: int, heads: int, peak: Peak | None, repeats: int = 3) -> list[list[float]]:
    """[seconds, peak bytes] of a layer's pass at each length, batch 1; spec "vanilla": softmax with all weights at once. No bytes without `peak`."""
    layer = Vanilla(dim, heads, pattern == "causal self") if spec == "vanilla" else layer_of(spec, pattern, dim, heads, max(lengths))
    found: list[list[float]] = [[], []]
    for length in lengths:
        x, taken = torch.randn(1, length, dim, generator=torch.Generator().manual_seed(0)), []
        for _ in range(repeats + 1):  # the first is a warm-up
            start = time.perf_counter()
            layer.eval()(x)
            taken.append(time.perf_counter() - start)
        found[0].append(statistics.median(taken[1:]))
        if peak is not None:
            found[1].append(float(peak(lambda x=x: layer(x))))  # type: ignore[misc]
    return found


@register("cab", kind="experiment")
def cab(
    methods: Sequence[str],
    *,
    length: int = 64,
    steps: int = 50,
    batch: int = 8,
    lr: float = 3e-3,
    seeds: Sequence[int] = (0,),
    samples: int = 32,
    dim: int = 32,
    heads: int = 2,
    depth: int = 1,
    lengths: Sequence[int] = (256, 512, 1024, 2048),
    peak: Peak | None = None,
) -> PatternReport:
    """Every method ("name", "name:key=value,...") in every pattern that it supports, on the pattern's tasks; means over seeds.

    peak: bytes alive at most during a call, such as `regard.lab.memory.peak_bytes` (None: no efficiency length of memory).
    """
    if not methods or len({*methods, REMOVED}) <= len(methods):
        raise RegardError(
            f"methods={list(methods)}; expected one or more, each once, and {REMOVED!r}, which is always measured, not at all"
        )
    if not seeds or steps < 1 or samples < 1 or batch < 1:
        raise RegardError(f"seeds={list(seeds)}, steps={steps}, samples={samples}, batch={batch}; expected one or more of each")
    kept, cells = {spec: supported(spec, dim, heads) for spec in methods}, tasks(length)
    result = PatternReport({m: {p: why for p, why in own.items() if why} for m, own in kept.items()})
    for (name, pattern), cell in cells.items():
        fitting = [spec for spec in methods if not kept[spec][pattern]]
        for spec in [*fitting, REMOVED] if fitting else []:
            nets = [trained(spec, cell, pattern, seed, steps, batch, lr, length, dim=dim, heads=heads, depth=depth) for seed in seeds]
            result.scores.setdefault(spec, {}).setdefault(pattern, {})[name] = mean([measured(net, cell, samples) for net in nets])
            if name == "language":
                for n in (length // 2, length, 2 * length, 4 * length):
                    at = dataclasses.replace(cell, draw=partial(language, length=n))
                    result.perplexity.setdefault(spec, {})[str(n)] = mean([measured(net, at, samples) for net in nets])["perplexity"]
    for pattern in PATTERNS:
        higher = {(name, key): up for (name, p), cell in cells.items() if p == pattern for key, (_, up) in cell.measures.items()}
        scores = {m: result.scores[m][pattern] for m in methods if not kept[m][pattern]}
        result.index[pattern] = compositional_index(scores, higher)
        for spec, own in scores.items():
            result.benefit.setdefault(spec, {})[pattern] = benefit(own, result.scores[REMOVED][pattern], higher)
    result.correlation = pattern_correlation(result.index)
    plain = {way: costs("vanilla", way, lengths, dim, heads, peak) for way in PATTERNS[:2] if any(not kept[m][way] for m in methods)}
    for spec in methods:
        way = next((p for p in PATTERNS[:2] if not kept[spec][p]), None)
        if way is not None:
            own_costs = costs(spec, way, lengths, dim, heads, peak)
            for kind, base, found, skip in zip(("time", "memory"), plain[way], own_costs, (1, 0), strict=True):
                if found:
                    result.efficiency.setdefault(spec, {})[kind] = efficiency_length(lengths, base, found, skip)
    return result
