"""Checks of hedgehog."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.adapt.linearise import distillation_loss
from regard.algebra import Recurrent
from regard.algebra.feature_map import mapped
from regard.catalog import get
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.feature_maps import naive_kernel
from regard.lab.checks.shared.recurrent import forms, qkv
from regard.lab.verification import check


def softmax_and_maps() -> tuple[Callable[[int], tuple[Tensor, Tensor, Tensor]], Tensor]:
    """A generator of (q, k, softmax weights) from fixed projections, std 1.6, N = 32, d = 16; and the causal mask."""
    w = torch.randn(2, 16, 16) * 1.6 / 4
    past = torch.ones(32, 32, dtype=torch.bool).tril()

    def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(batch, 1, 32, 16)
        q, k = x @ w[0], x @ w[1]
        return 1.6 * q, 1.6 * k, (1.6 * q @ (1.6 * k).transpose(-1, -2) / 4).masked_fill(~past, -math.inf).softmax(-1)

    return draw, past


def linear_weights(phi_q: Tensor, phi_k: Tensor, past: Tensor) -> Tensor:
    a = (phi_q @ phi_k.transpose(-1, -2)) * past
    return a / a.sum(-1, keepdim=True).clamp_min(1e-12)


def divergence(teacher: Tensor, student: Tensor) -> float:
    ratio = torch.where(teacher > 0, teacher.clamp_min(1e-30).log() - student.clamp_min(1e-12).log(), 0.0)
    return float((teacher * ratio).sum(-1).mean())


def distilled(steps: int = 300) -> tuple[float, float, float, float]:
    """(KL of the distilled map, KL of ELU + 1, rank correlation of the last row with softmax, the same of ELU + 1), on held-out data."""
    draw, past = softmax_and_maps()
    maps = [torch.eye(16)[None].clone().requires_grad_() for _ in range(2)]
    none = torch.zeros(1)
    optimizer = torch.optim.Adam(maps, 1e-2)
    for _ in range(steps):
        q, k, teacher = draw(16)
        student = linear_weights(mapped(q, maps[0], none, "softmax", 1e-12), mapped(k, maps[1], none, "softmax", 1e-12), past)
        optimizer.zero_grad()
        distillation_loss(student, teacher).backward()
        optimizer.step()
    with torch.no_grad():
        q, k, teacher = draw(64)
        student = linear_weights(mapped(q, maps[0], none, "softmax", 1e-12), mapped(k, maps[1], none, "softmax", 1e-12), past)
        elu = linear_weights(F.elu(q) + 1, F.elu(k) + 1, past)

        def rank(a: Tensor) -> float:
            places = [x[..., -1, :].argsort(-1).argsort(-1).double() for x in (a, teacher)]
            centred = [p - p.mean(-1, keepdim=True) for p in places]
            return float(((centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))).mean())

        return divergence(teacher, student), divergence(teacher, elu), rank(student), rank(elu)


@check(
    "hedgehog",
    "after 300 steps of attention distillation: held-out KL(softmax || map) / KL(softmax || ELU + 1)",
    below=0.65,
    control="the untrained map",
)
def _() -> tuple[float, float]:
    kl, elu, _, _ = distilled()
    torch.manual_seed(0)
    untrained, base, _, _ = distilled(0)
    return kl / elu, untrained / base


@check("hedgehog", "distilled weights keep softmax's order: rank correlation of the last row", above=0.7, control="ELU + 1")
def _() -> tuple[float, float]:
    _, _, own, elu = distilled()
    return own if own > elu + 0.15 else 0.0, elu


@check("hedgehog", "parallel == chunk == step, and equals a loop over the definition", below=1e-10, control="key map used for queries too")
def _() -> tuple[float, float]:
    q, k, v = qkv(37)
    maps = {name: torch.randn(2, 8, 8, dtype=F64) for name in ("query_map", "key_map")}
    zero = torch.zeros(2, dtype=F64)
    phi_q, phi_k = (mapped(x, maps[f"{side}_map"], zero, "softmax", 1e-12) for x, side in ((q, "query"), (k, "key")))
    truth = naive_kernel(phi_q, phi_k, v, 1e-12)
    mechanism = get("hedgehog")
    assert isinstance(mechanism, Recurrent)
    own = max(naive.gap(out, truth) for out in forms(mechanism, q, k, v, **maps))
    same = forms(mechanism, q, k, v, query_map=maps["key_map"], key_map=maps["key_map"])[0]
    return own, naive.gap(same, truth)
