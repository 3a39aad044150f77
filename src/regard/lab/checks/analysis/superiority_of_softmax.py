"""Checks of superiority-of-softmax."""

from __future__ import annotations

import math

import torch

from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.analysis.superiority_of_softmax import families, head_output, softmax_vs_linear, trained_accuracy, weights


@check(
    "superiority-of-softmax",
    "n = 64 .. 4096, own and crossed queries: least weight of the strong key",
    above=0.98,
    control="linear weights",
)
def _() -> tuple[float, float]:
    runs = [softmax_vs_linear(draws=50, cross=cross) for cross in (False, True)]
    return min(min(run.margin["softmax"]) for run in runs), max(max(run.margin["linear"]) for run in runs)


@check(
    "superiority-of-softmax",
    "margins fall as 1 / n under linear, 1 + s and elu + 1 weights: largest log-log slope",
    below=-0.85,
    control="softmax",
)
def _() -> tuple[float, float]:
    run = softmax_vs_linear(draws=50, normalizers=("softmax", "linear", "taylor", "elu"))
    slopes = [run.slope(name) for name in ("linear", "taylor", "elu")]
    return max(slopes) if min(slopes) >= -1.05 else 0.0, run.slope("softmax")


@check(
    "superiority-of-softmax",
    "weights of the strong key: closed forms n^a / (n^a + (n-1) n^c) and a / (a + (n-1) c)",
    below=1e-9,
    control="a and c exchanged",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for n in (64, 1024):
        queries, keys = families(3, n, True, jitter=0.0)
        forms = {"softmax": lambda a, c, n=n: n**a / (n**a + (n - 1) * n**c), "linear": lambda a, c, n=n: a / (a + (n - 1) * c)}
        for name, form in forms.items():
            gaps.append(float((head_output(queries, keys, name) - form(3.0, 0.5)).abs().max()))
            others.append(float((head_output(queries, keys, name) - form(0.5, 3.0)).abs().max()))
    s = torch.tensor([-800.0, 0.5, 900.0], dtype=F64)
    gaps.append(float((weights(s, "softmax") - torch.tensor([0.0, 0.0, 1.0])).abs().max()))
    taylor = torch.tensor([1.5, 1.25, 2.0], dtype=F64)
    gaps.append(float((weights(taylor - 1, "taylor") - taylor / taylor.sum()).abs().max()))
    exact = torch.tensor([math.exp(-1), 1.0, 2.0], dtype=F64)
    gaps.append(float((weights(torch.tensor([-1.0, 0, 1], dtype=F64), "elu") - exact / exact.sum()).abs().max()))
    return max(gaps), min(others)


@check(
    "superiority-of-softmax",
    "accuracy at n = 1024 behind readout noise, one threshold for all lengths",
    above=0.99,
    control="linear, the best threshold",
)
def _() -> tuple[float, float]:
    run = softmax_vs_linear(lengths=(1024,), draws=1000)
    return run.accuracy["softmax"][0], max(run.accuracy["linear"][0], run.accuracy["taylor"][0])


@check(
    "superiority-of-softmax",
    "scale and threshold learned on 256 keys: accuracy on 1024 keys",
    above=0.97,
    control="linear weights, learned alike",
)
def _() -> tuple[float, float]:
    own, linear = trained_accuracy("softmax", steps=120, draws=24), trained_accuracy("linear", steps=120, draws=24)
    return min(own), linear[1]
