"""Checks of attention-svm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.analysis.attention_svm import AttentionProblem, cosine, descend, draw_problem, nuclear_svm, svm

SEEDS = (0, 1, 2)


@check(
    "attention-svm",
    "Frobenius SVM, also for other tokens: SciPy's solution of the primal; margins of 1",
    below=1e-5,
    control="the mean of the differences",
)
def _() -> tuple[float, float]:
    gaps, means = [], []
    for seed in SEEDS:
        problem = draw_problem(seed=seed)
        for chosen in (None, (problem.optimal + 1) % 4):
            found, c = svm(problem, chosen), problem.constraints(chosen).flatten(1).numpy()
            truth = minimize(
                lambda w: 0.5 * w @ w, found.w.flatten().numpy() * 0.5, jac=lambda w: w, method="SLSQP",
                constraints=[{"type": "ineq", "fun": lambda w, c=c: c @ w - 1, "jac": lambda w, c=c: c}], options={"maxiter": 500, "ftol": 1e-15},
            )  # fmt: skip
            gaps += [naive.gap(found.w.flatten(), torch.from_numpy(truth.x)), max(0.0, 1 - float(found.margins.min()))]
            mean = torch.from_numpy(c).mean(0)
            means.append(naive.gap(mean / mean.norm() * found.w.norm(), found.w.flatten()))
    return max(gaps), min(means)


@check(
    "attention-svm",
    "normalised descent from 0, 3 problems: least cosine with the SVM (all optimal tokens selected)",
    above=0.95,
    control="random weights",
)
def _() -> tuple[float, float]:
    found, drawn = [], []
    for seed in SEEDS:
        problem = draw_problem(seed=seed)
        run = descend(problem)
        found.append(run.correlation[-1] if bool(run.optimal.all()) and abs(run.local - run.correlation[-1]) < 1e-9 else 0.0)
        generator = torch.Generator().manual_seed(seed)
        drawn.append(abs(cosine(torch.randn(6, 6, generator=generator, dtype=F64), svm(problem).w)))
    return min(found), max(drawn)


@check(
    "attention-svm",
    "nuclear SVM: objective over the nuclear norm of the Frobenius solution (it being K Q^T's own nuclear norm, margins 1)",
    below=0.99,
    control="the Frobenius solution",
)
def _() -> tuple[float, float]:
    ratios, own = [], []
    for seed in SEEDS:
        problem = draw_problem(seed=seed)
        found, other = nuclear_svm(problem), svm(problem)
        norm = float(torch.linalg.svdvals(found.w).sum())
        right = abs(found.objective - norm) < 1e-5 and float(found.margins.min()) > 1 - 1e-5
        u, s, vt = torch.linalg.svd(other.w)
        least = 0.5 * float((u * s.sqrt()).square().sum() + (vt.T * s.sqrt()).square().sum())
        ratios.append(found.objective / least if right else 1.0)
        own.append(least / float(torch.linalg.svdvals(other.w).sum()))
    return max(ratios), min(own)


def by_hand(problem: AttentionProblem, w: Tensor) -> Tensor:
    total = torch.zeros((), dtype=F64)
    for x, z, y in zip(problem.tokens, problem.z, problem.labels, strict=True):
        s = torch.stack([t @ w @ z for t in x])
        p = s.exp() / s.exp().sum()
        total = total + torch.log(1 + torch.exp(-y * sum(p[i] * (problem.v @ x[i]) for i in range(len(x)))))
    return total / len(problem.z)


@check(
    "attention-svm",
    "loss and gradient by loops, own and crossed queries; plain and factored steps of descent",
    below=1e-10,
    control="keys and queries exchanged",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for crossed in (False, True):
        problem = draw_problem(self_attention=not crossed, seed=4)
        w = torch.randn(6, 6, dtype=F64, requires_grad=True)
        slopes = [torch.autograd.grad(loss(w), w)[0] for loss in (problem.loss, lambda m: by_hand(problem, m))]  # noqa: B023
        gaps += [naive.gap(problem.loss(w), by_hand(problem, w)), naive.gap(*slopes)]
        others.append(naive.gap(problem.loss(w.T), by_hand(problem, w)))
        zero = torch.zeros(6, 6, dtype=F64, requires_grad=True)
        (slope,) = torch.autograd.grad(by_hand(problem, zero), zero)
        gaps += [naive.gap(descend(problem, steps=1, normalised=False).w, -0.1 * slope)]
        gaps += [naive.gap(descend(problem, steps=1).w, -0.1 * slope / slope.norm())]
        generator = torch.Generator().manual_seed(0)
        k, q = (0.3 * torch.randn(6, 2, generator=generator, dtype=F64) for _ in range(2))
        k.requires_grad_(), q.requires_grad_()
        by_k, by_q = torch.autograd.grad(by_hand(problem, k @ q.T), (k, q))
        gaps.append(naive.gap(descend(problem, steps=1, normalised=False, rank=2, init=0.3).w, (k - 0.1 * by_k) @ (q - 0.1 * by_q).T))
    return max(gaps), min(others)


@check(
    "attention-svm",
    "a token whose only SVM neighbours score less, approached from near: cosine with its own SVM where it is not the optimal one",
    above=0.9,
    control="with the optimal tokens' SVM",
)
def _() -> tuple[float, float]:
    x = torch.zeros(1, 3, 4, dtype=F64)
    x[0, 0, 0], x[0, 1, 1], x[0, 2] = 1.0, 1.0, torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=F64)
    x = F.normalize(x + 0.05, dim=-1)
    v = torch.tensor([1.0, 0.6, 0.0, -1.0], dtype=F64)
    problem = AttentionProblem(x, x[:, 2], torch.ones(1, dtype=F64), v)
    start = svm(problem, torch.tensor([1])).w
    w = 30 * start / start.norm()
    w.requires_grad_()
    for _ in range(300):
        (slope,) = torch.autograd.grad(problem.loss(w), w)
        w = (w - 0.01 * slope / slope.norm()).detach().requires_grad_()
    local, best = cosine(w.detach(), start), cosine(w.detach(), svm(problem).w)
    return local if int(problem.probabilities(w.detach()).argmax()) == 1 and int(problem.optimal) == 0 else 0.0, best
