"""Checks of deltanet."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Recurrent
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.recurrent import forms, gradient_gap, qkv
from regard.lab.verification import check


def delta_inputs(n: int = 64) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    return q, F.normalize(k, dim=-1), v, {"beta": torch.rand(1, 2, n, dtype=F64)}


@check("deltanet", "parallel and chunked (WY) forms equal the recurrence", below=1e-10, control="additive writes")
def _() -> tuple[float, float]:
    mechanism = get("deltanet")
    assert isinstance(mechanism, Recurrent)
    q, k, v, inputs = delta_inputs()
    truth = naive.recurrence(q / math.sqrt(8), k, v, beta=inputs["beta"])[0]
    own = max(naive.gap(out, truth) for out in forms(mechanism, q, k, v, **inputs))
    return own, naive.gap(naive.recurrence(q / math.sqrt(8), k, inputs["beta"][..., None] * v)[0], truth)


@check("deltanet", "gradients, beta's included, equal those of the token loop", below=1e-8, control="additive writes")
def _() -> tuple[float, float]:
    q, k, v, inputs = delta_inputs()
    mechanism = get("deltanet")
    assert isinstance(mechanism, Recurrent)
    return (
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, b: naive.recurrence(q / math.sqrt(8), k, v, beta=b)[0]),
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, b: naive.recurrence(q / math.sqrt(8), k, b[..., None] * v)[0]),
    )


@check(
    "deltanet",
    "8 orthonormal keys written 64 times with beta = 1: each read gives the LAST value written",
    below=1e-12,
    control="additive writes",
)
def _() -> tuple[float, float]:
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0]
    order = torch.cat([torch.randperm(8) for _ in range(8)])
    k, v = basis[order][None, None], torch.randn(1, 1, 64, 5, dtype=F64)
    last = torch.stack([v[0, 0, int((order == key).nonzero().max())] for key in range(8)])
    reads = basis[None, None]
    queries = torch.cat((torch.zeros(1, 1, 64, 8, dtype=F64), reads), 2)
    keys, values = torch.cat((k, torch.zeros(1, 1, 8, 8, dtype=F64)), 2), torch.cat((v, torch.zeros(1, 1, 8, 5, dtype=F64)), 2)

    def read(mechanism: Recurrent, **inputs: Tensor) -> float:
        return naive.gap(attend(queries, keys, values, mechanism, scale=1.0, **inputs)[0, 0, 64:], last)

    delta = get("deltanet")
    assert isinstance(delta, Recurrent)
    return read(delta, beta=torch.ones(1, 1, 72, dtype=F64)), read(
        replace(delta, write="add", decay="head", inputs=()), log_decay=torch.zeros(1, dtype=F64)
    )


@check("deltanet", "beta = 0 leaves a carried state unchanged", below=0.0, control="beta = 0.5")
def _() -> tuple[float, float]:
    q, k, v, inputs = delta_inputs()
    _, before = step(q, k, v, "deltanet", **inputs)

    def moved(beta: float) -> float:
        _, after = step(q, k, v, "deltanet", before, beta=torch.full((1, 2, 64), beta, dtype=F64))
        return naive.gap(after.s, before.s)  # type: ignore[union-attr]

    return moved(0.0), moved(0.5)
