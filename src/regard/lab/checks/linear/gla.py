"""Checks of gla."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Recurrent
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.recurrent import forms, gradient_gap, qkv
from regard.lab.verification import check


def gla_inputs(n: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    return q, k, v, {"log_decay": -strength * torch.rand(1, 2, n, 8, dtype=F64)}


@check(
    "gla",
    "parallel, chunked and secondary-chunked forms equal the recurrence, weak and strong gates",
    below=1e-10,
    control="one gate a token",
)
def _() -> tuple[float, float]:
    mechanism = get("gla")
    assert isinstance(mechanism, Recurrent)
    own = other = 0.0
    for strength in (0.1, 8.0):
        q, k, v, inputs = gla_inputs(64, strength)
        truth = naive.recurrence(q / math.sqrt(8), k, v, inputs["log_decay"])[0]
        own = max([own, *[naive.gap(out, truth) for chunk in (16, 64) for out in forms(mechanism, q, k, v, chunk, **inputs)]])
        mean = inputs["log_decay"].mean(-1, keepdim=True).expand_as(inputs["log_decay"])
        other = max(other, naive.gap(forms(mechanism, q, k, v, log_decay=mean)[1], truth))
    return own, other


@check("gla", "gradients, the gate's included, equal those of the token loop", below=1e-8, control="scale left out")
def _() -> tuple[float, float]:
    q, k, v, inputs = gla_inputs(64)
    mechanism = get("gla")
    assert isinstance(mechanism, Recurrent)
    return (
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, g: naive.recurrence(q / math.sqrt(8), k, v, g)[0]),
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, g: naive.recurrence(q, k, v, g)[0]),
    )


@check("gla", "strong gates (about -4 a token) in float32 match float64: relative error", below=1e-4, control="naive Q e^B, K e^-B")
def _() -> tuple[float, float]:
    q, k, v = (x.float() for x in qkv(64))
    g = -4 - 0.5 * torch.rand(1, 2, 64, 8)
    truth = naive.recurrence(q.double() / math.sqrt(8), k.double(), v.double(), g.double())[0]
    own = naive.gap(attend(q, k, v, "gla", log_decay=g).double(), truth) / float(truth.abs().max())
    total = g.cumsum(-2)
    split = ((q * torch.exp(total) / math.sqrt(8)) @ (k * torch.exp(-total)).transpose(-1, -2)).tril() @ v
    return own, naive.gap(split.double(), truth) / float(truth.abs().max())


@check(
    "gla", "equal gates in all channels are Lightning's scalar decay, alpha = 1 plain linear attention", below=1e-10, control="other gates"
)
def _() -> tuple[float, float]:
    q, k, v, inputs = gla_inputs(50)
    g = torch.tensor([-0.1, -0.3], dtype=F64)
    same = attend(q, k, v, "gla", scale=1.0, log_decay=g[None, :, None, None].expand(1, 2, 50, 8))
    light = attend(q, k, v, "lightning-attention-2", log_decay=g)
    plain = attend(q, k, v, "gla", scale=1.0, log_decay=torch.zeros(1, 2, 50, 8, dtype=F64))
    own = max(naive.gap(same, light), naive.gap(plain, (q @ k.transpose(-1, -2)).tril() @ v))
    return own, naive.gap(attend(q, k, v, "gla", scale=1.0, **inputs), light)
