"""Checks of tapa."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Rope
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


@check("tapa", "tiles, causal, with gradients == the formula in full", below=1e-10, control="phases without the tokens' part")
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(37))
    i = torch.arange(37)
    distance = (i[:, None] - i).abs().double() ** 0.1

    def dense(free: bool) -> Tensor:
        phase = 1.0 if free else q[..., 4:] @ k[..., 4:].transpose(-1, -2) / 2
        s = q[..., :4] @ k[..., :4].transpose(-1, -2) / 2 * torch.cos(2 * math.pi * distance * phase)
        return s.masked_fill(i[:, None] < i, -torch.inf).softmax(-1) @ v

    own = attend(q, k, v, "tapa", mask=Causal())
    seed = torch.randn_like(own)
    grads = [torch.autograd.grad((o * seed).sum(), (q, k, v)) for o in (own, dense(False))]
    return max(naive.gap(own, dense(False)), *[naive.gap(a, b) for a, b in zip(*grads, strict=True)]), naive.gap(own, dense(True))


@check("tapa", "with the phase channels zero it is dot-product attention on the others", below=1e-12, control="with the phase")
def _() -> tuple[float, float]:
    q, k, v = qkv(37)
    plain = attend(q[..., :4], k[..., :4], v)
    quiet = torch.cat((q[..., :4], torch.zeros_like(q[..., 4:])), -1)
    return naive.gap(attend(quiet, k, v, "tapa"), plain), naive.gap(attend(q, k, v, "tapa"), plain)


@check(
    "tapa",
    "largest distance bias left at 10 and 1000 tokens: mean score over that at 0, E[qA.kA] != 0, D = 64",
    below=0.01,
    control="RoPE with the same means",
)
def _() -> tuple[float, float]:
    draws, d = 200_000, 64
    q, k = 1 + torch.randn(draws, d), 1 + torch.randn(draws, d)
    q[:, 32:] -= 1
    k[:, 32:] -= 1
    score = get("tapa").score  # type: ignore[attr-defined]
    left = []
    parts = [x[:, None] for x in score.prepare(q, k, 1.0, {})]
    means = [float(score.pair(*parts, {"i": torch.tensor([[r]]), "j": torch.tensor([0])}).double().mean()) for r in (0, 1, 10, 1000)]
    for r, mean in zip((1, 10, 1000), means[1:], strict=True):
        t = 2 * math.pi * r**0.1
        left.append(abs(mean / means[0] - (1 + t * t / 32) ** -16))
    ones = torch.ones(1, 1, 1, d)
    turned = [float((Rope().rotate(ones, torch.tensor([r])) * ones).sum()) / d for r in (1, 10, 1000)]
    return max(left), max(abs(x) for x in turned)
