"""Speed and memory against length: layers of each mechanism timed in turns, each as a ratio to softmax in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..memory import peak_bytes
from .config import BASELINE, Config, layer_of

DIM, HEADS = 128, 2
DECODED = 8


def seeded(config: Config, spec: str) -> nn.Module:
    torch.manual_seed(config.seed)
    return layer_of(spec, DIM, HEADS).eval()


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median, and half the range."""
    return {"median": statistics.median(values), "spread": (max(values) - min(values)) / 2}


@torch.no_grad()
def measure(config: Config, seconds: float, tick: Callable[[float], None]) -> dict[str, dict[str, Any]]:
    """For each mechanism and length: prefill seconds, peak bytes, decode seconds a token, state bytes; and ratios to softmax.

    The lengths are those, shortest first, that fit into `seconds`: each takes two to four times as long as the one before it.
    """
    specs = list(config.mechanisms) + ([BASELINE] if BASELINE not in config.mechanisms else [])
    layers: dict[str, Any] = {spec: seeded(config, spec) for spec in specs}
    found: dict[str, dict[str, Any]] = {spec: {"prefill": {}, "memory": {}, "decode": {}, "state": {}} for spec in specs}
    start, last = time.perf_counter(), 0.0
    for length in config.lengths:
        began = time.perf_counter()
        if last and began - start + 2.5 * last > seconds:
            break
        x = torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(config.seed))
        rounds = 5 if length <= 2048 else 3
        times: dict[str, list[float]] = {spec: [] for spec in specs}
        for _ in range(rounds):  # in turns, so that a slow moment of the machine touches all alike
            for spec in specs:
                times[spec].append(timed(lambda spec=spec, x=x: layers[spec](x)))  # type: ignore[misc]
                tick(time.perf_counter() - start)
        states = {spec: layers[spec].step(x)[1] for spec in specs}
        steps: dict[str, list[float]] = {spec: [] for spec in specs}
        for at in range(DECODED):
            for spec in specs:
                token = x[:, at : at + 1]
                start = time.perf_counter()
                _, states[spec] = layers[spec].step(token, states[spec])
                steps[spec].append(time.perf_counter() - start)
        for spec in specs:
            one = found[spec]
            one["prefill"][str(length)] = spread(times[spec])
            one["decode"][str(length)] = spread(steps[spec][1:])
            one["memory"][str(length)] = peak_bytes(lambda spec=spec, x=x: layers[spec](x))  # type: ignore[misc]
            one["state"][str(length)] = states[spec].bytes
        last = time.perf_counter() - began
    return with_ratios(found)


def with_ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    base = found[BASELINE]
    for one in found.values():
        one["ratio"] = {
            key: {length: one[key][length]["median"] / base[key][length]["median"] for length in one[key]} for key in ("prefill", "decode")
        } | {key: {length: one[key][length] / base[key][length] for length in one[key]} for key in ("memory", "state")}
    return found
