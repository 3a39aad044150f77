"""Checks of taylorshift."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.linear import unit_rows
from regard.lab.checks.shared.weighted import qkv
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.zoo.softmax.taylorshift import TaylorShiftAttention, crossover


def taylor_weights(q: Tensor, k: Tensor, tau: Tensor, causal: bool = False, order: int = 2) -> Tensor:
    x = tau[:, None, None] * (unit_rows(q) @ unit_rows(k).transpose(-1, -2))
    t = 1 + x + (x * x / 2 if order == 2 else 0)
    t = t.tril() if causal else t
    return t / t.sum(-1, keepdim=True)


@check(
    "taylorshift",
    "n = 70, D = 8: efficient and direct, both directions and causal, with gradients == the formula",
    below=1e-9,
    control="first order alone",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(70))
    tau = torch.tensor([0.8, 1.7], dtype=F64, requires_grad=True)
    gaps, leaves = [], (q, k, v, tau)
    for causal in (False, True):
        truth = taylor_weights(q, k, tau, causal) @ v
        seed = torch.randn_like(truth)
        expected = torch.autograd.grad((truth * seed).sum(), leaves)
        for mode in ("efficient", "direct"):
            out = attend(q, k, v, get("taylorshift", mode=mode), mask=Causal() if causal else None, tau=tau)
            found = torch.autograd.grad((out * seed).sum(), leaves)
            gaps += [naive.gap(out, truth), *[naive.gap(a, b) for a, b in zip(found, expected, strict=True)]]
    other = taylor_weights(q, k, tau, order=1) @ v
    return max(gaps), naive.gap(attend(q, k, v, "taylorshift", tau=tau), other)


@check("taylorshift", "the layer's two forms agree, with its output scale", below=1e-9, control="one of them without the scale")
def _() -> tuple[float, float]:
    layer = TaylorShiftAttention(16, 2, mode="direct").double()
    x = torch.randn(2, 40, 16, dtype=F64)
    direct = layer(x)
    layer.mode = "efficient"
    efficient = layer(x)
    layer.output_scale = False
    return naive.gap(efficient, direct), naive.gap(layer(x), direct)


@check("taylorshift", "auto switches exactly at N0 = D^2 + D + 1 (wrong choices over D = 4, 8, 16)", below=0.0, control="a switch at D^2")
def _() -> tuple[float, float]:
    def wrong(at: int, d: int) -> int:
        layer = TaylorShiftAttention(2 * d, 2)
        return sum(layer.form(n) != ("efficient" if n >= at else "direct") for n in range(at - 30, at + 31))

    return sum(wrong(d * d + d + 1, d) for d in (4, 8, 16)), sum(wrong(d * d, d) for d in (4, 8, 16))


@check("taylorshift", "largest tensor of the efficient form at n = 4096, D = 8, over n^2", below=0.25, control="weights in full")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 4096, 8) for _ in range(3))
    tau = torch.ones(1)
    assert crossover(8) < 4096
    own = largest_tensor(lambda: attend(q, k, v, "taylorshift"))
    return own / 4096**2, largest_tensor(lambda: taylor_weights(q, k, tau) @ v) / 4096**2


@check("taylorshift", "weights are positive and sum to one (from the output of ones)", below=1e-12, control="without the denominator")
def _() -> tuple[float, float]:
    q, k, v = qkv(70)
    ones = torch.ones_like(v)
    raw = (1 + unit_rows(q) @ unit_rows(k).transpose(-1, -2)) @ ones
    return naive.gap(attend(q, k, ones, "taylorshift"), ones), naive.gap(raw, ones)
