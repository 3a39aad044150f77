"""Checks of cottention."""

from __future__ import annotations

import torch

from regard.algebra import Causal, Padding
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.linear import unit_rows
from regard.lab.checks.shared.weighted import qkv
from regard.lab.memory import largest_tensor
from regard.lab.verification import check


@check(
    "cottention",
    "causal, n = 50: chunks and steps == sum_j cos(q_i, k_j) v_j / j^p in loops",
    below=1e-10,
    control="the divisor at the output",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(50, 16)
    p = torch.sigmoid(torch.tensor([0.5, -1.0], dtype=F64))
    near = (unit_rows(q) @ unit_rows(k).transpose(-1, -2)).tril()
    length = torch.arange(1, 51, dtype=F64)
    truth = near @ (v / length[:, None] ** p[:, None, None])
    state, outs = None, []
    for t in range(50):
        out, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], "cottention", state, power=p)
        outs.append(out)
    found = [attend(q, k, v, "cottention", mask=Causal(), executor=e, power=p) for e in ("chunk", "step", "parallel")]
    other = attend(q, k, v, get("cottention", divide="output"), mask=Causal(), power=p)
    return max(naive.gap(x, truth) for x in (*found, torch.cat(outs, 2))), naive.gap(other, truth)


@check("cottention", "both directions with padding: linear == quadratic with n the real tokens", below=1e-10, control="n with padding")
def _() -> tuple[float, float]:
    q, k, v = qkv(50, 16)
    keep = (torch.arange(50) < 33)[None]
    p = torch.sigmoid(torch.tensor([0.5, -1.0], dtype=F64))
    out = attend(q, k, v, "cottention", mask=Padding(), keep=keep, power=p)
    near = (unit_rows(q) @ unit_rows(k).transpose(-1, -2))[..., :33] @ v[:, :, :33]
    return tuple(naive.gap(out, near / n ** p[:, None, None]) for n in (33, 50))  # type: ignore[return-value]


@check("cottention", "gradients of chunks == those of the sum written out", below=1e-9, control="the divisor at the output")
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(50, 16))
    seed = torch.randn(1, 2, 50, 16, dtype=F64)
    length = torch.arange(1, 51, dtype=F64)[:, None] ** torch.sigmoid(torch.tensor(0.5, dtype=F64))
    near = (unit_rows(q) @ unit_rows(k).transpose(-1, -2)).tril()
    truth = torch.autograd.grad(((near @ (v / length)) * seed).sum(), (q, k, v))

    def off(divide: str) -> float:
        out = attend(q, k, v, get("cottention", divide=divide), mask=Causal(), executor="chunk")
        return max(naive.gap(a, b) for a, b in zip(torch.autograd.grad((out * seed).sum(), (q, k, v)), truth, strict=True))

    return off("value"), off("output")


@check("cottention", "largest tensor at n = 4096 over n^2", below=0.25, control="the quadratic form")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 4096, 16) for _ in range(3))
    found = [largest_tensor(lambda e=e: attend(q, k, v, "cottention", mask=Causal(), executor=e)) for e in ("chunk", "parallel")]  # type: ignore[misc]
    return found[0] / 4096**2, found[1] / 4096**2
