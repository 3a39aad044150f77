"""Checks of bayesian-attention-view."""

from __future__ import annotations

import torch

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax.bayesian_attention_view import (
    coupled_marginals,
    energy,
    enumerate_joint,
    iterate,
    mixture_step,
    structural_attention,
)


@check(
    "bayesian-attention-view",
    "4 queries x 3 keys, 2 heads: all 81 assignments enumerated == softmax attention, with a prior as bias",
    below=1e-12,
    control="coupled edges",
)
def _() -> tuple[float, float]:
    q, k, v = torch.randn(2, 4, 8, dtype=F64), torch.randn(2, 3, 8, dtype=F64), torch.randn(2, 3, 5, dtype=F64)
    prior = torch.rand(2, 4, 3, dtype=F64).log()
    psi = q @ k.transpose(-1, -2) / 8**0.5
    joint = torch.stack([enumerate_joint(psi[h], log_prior=prior[h]) for h in range(2)])
    plain = torch.stack([enumerate_joint(psi[h]) for h in range(2)])
    library = structural_attention(psi, v, log_prior=prior)[0]
    truth = attend(q[None], k[None], v[None])[0]
    own = max(naive.gap(library, joint @ v), naive.gap(plain @ v, truth), naive.gap(library, (psi + prior).softmax(-1) @ v))
    coupling = torch.randn(4, 3, 4, 3, dtype=F64)
    return own, naive.gap(enumerate_joint(psi[0], coupling), psi[0].softmax(-1))


@check(
    "bayesian-attention-view",
    "beta = 1e4 == gathering the best key; slots == one EM step of a mixture; Hopfield's step == the energy's gradient",
    below=1e-10,
    control="beta = 1, in the first of these",
)
def _() -> tuple[float, float]:
    psi, v = torch.randn(6, 9, dtype=F64), torch.randn(9, 5, dtype=F64)
    best = v[psi.argmax(-1)]
    hot = naive.gap(structural_attention(1e4 * psi, v)[0], best)
    x, means = torch.randn(20, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    slot_scores = means @ x.T - means.square().sum(-1, keepdim=True) / 2
    slots = naive.gap(structural_attention(slot_scores, x, over="queries")[0], mixture_step(x, means))
    at = torch.randn(6, 3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy(at, x, 2.0).sum(), at)
    step = naive.gap(iterate(at, x, 2.0) - at, -gradient)
    return max(hot, slots, step, naive.gap(structural_attention(psi, v, hard=True)[0], best)), naive.gap(
        structural_attention(psi, v)[0], best
    )


@check("bayesian-attention-view", "a chain of coupled edges: sum-product == enumeration", below=1e-12, control="independent softmax")
def _() -> tuple[float, float]:
    psi, pair = torch.randn(4, 3, dtype=F64), torch.randn(3, 3, 3, dtype=F64)
    coupling = torch.zeros(4, 3, 4, 3, dtype=F64)
    for i in range(3):
        coupling[i, :, i + 1] = pair[i]
    truth = enumerate_joint(psi, coupling)
    return naive.gap(coupled_marginals(psi, pair), truth), naive.gap(psi.softmax(-1), truth)
