"""Checks of hedgehog."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

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
from regard.lab.checks.shared.layers import joined, split
from regard.lab.checks.shared.recurrent import forms, qkv
from regard.lab.verification import check
from regard.nn.attention import Attention


def softmax_and_maps() -> tuple[Callable[[int], tuple[Tensor, Tensor, Tensor]], Tensor]:
    """A generator of (q, k, softmax weights) from fixed projections, std 1.6, N = 32, d = 16; and the causal mask."""
    w = torch.randn(2, 16, 16) * 1.6 / 4
    past = torch.ones(32, 32, dtype=torch.bool).tril()

    def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(batch, 1, 32, 16)
        q, k = x @ w[0], x @ w[1]
        return q, k, (q @ k.transpose(-1, -2) / 4).masked_fill(~past, -math.inf).softmax(-1)

    return draw, past


def linear_weights(phi_q: Tensor, phi_k: Tensor, past: Tensor) -> Tensor:
    a = (phi_q @ phi_k.transpose(-1, -2)) * past
    return a / a.sum(-1, keepdim=True).clamp_min(1e-12)


def divergence(teacher: Tensor, student: Tensor) -> float:
    ratio = torch.where(teacher > 0, teacher.clamp_min(1e-30).log() - student.clamp_min(1e-12).log(), 0.0)
    return float((teacher * ratio).sum(-1).mean())


class Distilled(NamedTuple):
    """On held-out data, of the distilled map and of ELU + 1: KL(softmax || map), rank correlation of the last row with softmax; mean
    entropies of rows of softmax, map and ELU + 1."""

    divergence: float
    elu_divergence: float
    rank: float
    elu_rank: float
    entropies: tuple[float, float, float]


@functools.cache
def distilled(steps: int = 300) -> Distilled:
    torch.manual_seed(0)
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

        entropies = [float(-torch.special.xlogy(p, p).sum(-1).mean()) for p in (teacher, student, elu)]
        return Distilled(divergence(teacher, student), divergence(teacher, elu), rank(student), rank(elu), tuple(entropies))  # type: ignore[arg-type]


@check(
    "hedgehog",
    "after 300 steps of attention distillation: held-out KL(softmax || map) / KL(softmax || ELU + 1)",
    below=0.65,
    control="the untrained map",
)
def _() -> tuple[float, float]:
    trained, start = distilled(), distilled(0)
    return trained.divergence / trained.elu_divergence, start.divergence / start.elu_divergence


@check("hedgehog", "distilled weights keep softmax's order: rank correlation of the last row", above=0.7, control="ELU + 1")
def _() -> tuple[float, float]:
    found = distilled()
    return found.rank if found.rank > found.elu_rank + 0.15 else 0.0, found.elu_rank


def hedgehog_features(x: Tensor, weight: Tensor, shift: Tensor, form: str, clamp: float) -> Tensor:
    """The map a head at a time, from exponentials."""
    made = []
    for h in range(x.shape[1]):
        y = x[:, h] @ weight[h].T + shift[h]
        up, down = torch.exp(y), torch.exp(-y)
        made.append(
            {
                "softmax": torch.cat((up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)), -1),
                "half": up / up.sum(-1, keepdim=True),
                "exp": torch.cat((up, down), -1),
                "exp_shifted": torch.cat((up / up.amax(-1, keepdim=True), down / down.amax(-1, keepdim=True)), -1),
            }[form].clamp_min(clamp)
        )
    return torch.stack(made, 1)


@check(
    "hedgehog", "every form, parallel == chunk == step == a loop over the definition", below=1e-10, control="key map used for queries too"
)
def _() -> tuple[float, float]:
    q, k, v = qkv(37)
    maps = {name: torch.randn(2, 8, 8, dtype=F64) / 2 for name in ("query_map", "key_map")}
    shifts = {name: torch.randn(2, dtype=F64) for name in ("query_shift", "key_shift")}
    own, other = [], math.inf
    for form in ("softmax", "half", "exp", "exp_shifted"):
        for eps, clamp, divide in ((1e-12, 1e-12, "add"), (0.3, 0.02, "add"), (0.5, 0.02, "sum")):
            phi_q, phi_k = (
                hedgehog_features(x, maps[f"{n}_map"], shifts[f"{n}_shift"], form, clamp) for x, n in ((q, "query"), (k, "key"))
            )
            w = (phi_q @ phi_k.mT).tril()
            total = w.sum(-1, keepdim=True)
            truth = w @ v / (total + eps if divide == "add" else total.clamp_min(eps))
            mechanism = get("hedgehog", form=form, clamp=clamp, eps=eps, divide=divide)
            assert isinstance(mechanism, Recurrent)
            own += [naive.gap(out, truth) for out in forms(mechanism, q, k, v, **maps, **shifts)]
            same = forms(mechanism, q, k, v, query_map=maps["key_map"], key_map=maps["key_map"], **shifts)[0]
            other = min(other, naive.gap(same, truth))
    return max(own), other


@check(
    "hedgehog",
    "the layer's maps start as the identity without shifts: its output == softmax features by hand",
    below=1e-10,
    control="maps of -1",
)
def _() -> tuple[float, float]:
    layer, x = Attention(16, 2, "hedgehog").double(), torch.randn(2, 9, 16, dtype=F64)
    q, k, v = (split(y(x), 2) for y in (layer.q, layer.k, layer.v))
    none, y = torch.zeros(2, dtype=F64), layer(x)

    def truth(sign: float) -> Tensor:
        eye = torch.eye(8, dtype=F64).expand(2, 8, 8)
        phi = [hedgehog_features(z, w, none, "softmax", 1e-12) for z, w in ((q, eye), (k, sign * eye))]
        return layer.out(joined(naive_kernel(phi[0], phi[1], v, 1e-12)))  # type: ignore[no-any-return]

    return naive.gap(y, truth(1.0)), naive.gap(y, truth(-1.0))


@check(
    "hedgehog",
    "entropy of distilled weights, in nats: above softmax's and below that of ELU + 1 by",
    above=0.2,
    control="the untrained map",
)
def _() -> tuple[float, float]:
    def between(steps: int) -> float:
        soft, own, elu = distilled(steps).entropies
        return min(own - soft, elu - own)

    return between(300), between(0)
