"""Checks of swat."""

from __future__ import annotations

import math

import torch

from regard.algebra import Rope
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.engine.stream import KeyValueState
from regard.lab import naive
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


@check("swat", "windowed sigmoid with RoPE and balanced slopes == the formula in loops", below=1e-12, control="all slopes negative")
def _() -> tuple[float, float]:
    q, k, v = qkv(29, heads=4)
    turned = [Rope().rotate(x, torch.arange(29)) for x in (q, k)]
    truth = torch.zeros_like(v)
    for h, slope in enumerate((-0.5, -0.25, 0.5, 0.25)):
        for i in range(29):
            for j in range(max(0, i - 6), i + 1):
                s = float(turned[0][0, h, i] @ turned[1][0, h, j]) / math.sqrt(8) + slope * (i - j)
                truth[0, h, i] += v[0, h, j] / (1 + math.exp(-s))
    balanced, negative = (get("swat", window=7, balance=x) for x in ("balanced", "negative"))
    return naive.gap(attend(q, k, v, balanced), truth), naive.gap(attend(q, k, v, negative), truth)


@check("swat", "decoding with a cache of at most `window` tokens == prefill", below=1e-10, control="window one shorter")
def _() -> tuple[float, float]:
    q, k, v = qkv(40, heads=4)
    whole = attend(q, k, v, get("swat", window=7))

    def gap(window: int) -> float:
        state, outs = None, []
        for t in range(40):
            out, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], get("swat", window=window), state)
            outs.append(out)
            assert isinstance(state, KeyValueState)
            if state.k.shape[-2] != min(t + 1, window):
                return math.inf
        return naive.gap(torch.cat(outs, 2), whole)

    return gap(7), gap(6)


@check("swat", "changing token m - w leaves output m as it is", below=0.0, control="changing token m - w + 1")
def _() -> tuple[float, float]:
    q, k, v = qkv(40, heads=4)
    swat = get("swat", window=7)

    def change(at: int) -> float:
        other = [x.clone() for x in (k, v)]
        for x in other:
            x[:, :, at] += 1
        return naive.gap(attend(q, *other, swat)[:, :, 30], attend(q, k, v, swat)[:, :, 30])  # type: ignore[call-arg, arg-type]

    return change(30 - 7), change(30 - 7 + 1)
