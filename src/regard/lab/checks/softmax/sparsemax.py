"""Checks of sparsemax."""

from __future__ import annotations

import math

import torch
from torch.autograd import gradcheck

from regard.algebra import Causal
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import weights_of
from regard.lab.verification import check
from regard.zoo.softmax.sparsemax import sparsemax_loss, sparsemax_weights


@check(
    "sparsemax", "weights are the projection onto the simplex, ties and causal masks included", below=1e-12, control="softmax cut at 1/n"
)
def _() -> tuple[float, float]:
    s = 2 * torch.randn(60, 60, dtype=F64)
    s[::7, 3] = s[::7, 5]
    truth = torch.zeros_like(s)
    for i in range(60):
        truth[i, : i + 1] = naive.projection(s[i, : i + 1])
    p = s.masked_fill(~torch.ones(60, 60, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    cut = torch.where(p > 1 / 60, p, 0.0)
    return naive.gap(weights_of(s, "sparsemax", Causal()), truth), naive.gap(cut / cut.sum(-1, keepdim=True), truth)


@check("sparsemax", "at least 70% of weights are exactly zero at logit std 2, n = 64", above=0.7, control="softmax")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(200, 64, dtype=F64)
    return float((weights_of(s, "sparsemax") == 0).double().mean()), float((weights_of(s, "softmax") == 0).double().mean())


@check("sparsemax", "the loss's gradient is sparsemax(z) - onehot", below=1e-12, control="cross-entropy's gradient")
def _() -> tuple[float, float]:
    z = (2 * torch.randn(20, 9, dtype=F64)).requires_grad_()
    target = torch.randint(9, (20,))
    truth = torch.stack([naive.projection(row) for row in z.detach()]) - torch.nn.functional.one_hot(target, 9)
    (own,) = torch.autograd.grad(sparsemax_loss(z, target).sum(), z)
    (other,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, target, reduction="sum"), z)
    return naive.gap(own, truth), naive.gap(other, truth)


@check("sparsemax", "the loss is 0 at margin 1", below=1e-15, control="margin 0.99")
def _() -> tuple[float, float]:
    def loss(margin: float) -> float:
        return float(sparsemax_loss(torch.tensor([margin, 0.0, -1.0], dtype=F64), torch.tensor(0)))

    return loss(1.0), loss(0.99)


@check("sparsemax", "the function's backward passes gradcheck (1)", above=1.0, control="a straight-through gradient")
def _() -> tuple[float, float]:
    z = torch.randn(5, 9, dtype=F64, requires_grad=True)
    through = gradcheck(lambda z: z + (sparsemax_weights(z) - z).detach(), (z,), raise_exception=False)
    return float(gradcheck(sparsemax_weights, (z,), raise_exception=False)), float(through)
