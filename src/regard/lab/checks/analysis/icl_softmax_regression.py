"""Checks of icl-softmax-regression."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.analysis.icl_softmax_regression import (
    SoftmaxRegression,
    attention_prediction,
    closeness_experiment,
    descent_prediction,
    rewritten,
    trained_closeness,
)


def problem(seed: int = 0) -> tuple[SoftmaxRegression, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, x = torch.randn(32, 8, generator=generator, dtype=F64), torch.randn(8, generator=generator, dtype=F64)
    return SoftmaxRegression(a, torch.rand(32, generator=generator, dtype=F64).softmax(0)), x


@check("icl-softmax-regression", "gradients by x and A and Hessian products: autograd's", below=1e-12, control="without the term f f^T")
def _() -> tuple[float, float]:
    one, x = problem()
    leaf, data, v = x.clone().requires_grad_(), one.a.clone().requires_grad_(), torch.randn(8, dtype=F64)

    def loss(a: Tensor, z: Tensor) -> Tensor:
        e = (a @ z).exp()
        return 0.5 * ((e / e.sum() - one.b) ** 2).sum()

    by_x, by_a = torch.autograd.grad(loss(data, leaf), (leaf, data))
    _, product = torch.autograd.functional.hvp(lambda z: loss(one.a, z), x, v)
    f = one.f(x)
    own = max(naive.gap(one.gradient(x), by_x), naive.gap(one.data_gradient(x), by_a), naive.gap(one.hessian_product(x, v), product))
    own = max(own, naive.gap(one.loss(x), loss(one.a, x)), naive.gap(one.descend(x, 0.3, 2), (y := x - 0.3 * by_x) - 0.3 * one.gradient(y)))
    return own, naive.gap(one.a.T @ (f * (f - one.b)), by_x)


@check(
    "icl-softmax-regression",
    "moved weights as a moved target: difference of the residuals, and of shifts over |A| / 2 |dx| and |x| / 2 |dA| above 1 (500 pairs)",
    below=1e-9,
    control="bounds of a quarter",
)
def _() -> tuple[float, float]:
    one, x = problem()
    generator, gaps, worst = torch.Generator().manual_seed(1), [], 0.0
    for n in range(500):
        new = x + 10 ** (-(n % 3)) * torch.randn(8, generator=generator, dtype=F64)
        target = one.moved_target(x, new)
        gaps.append(naive.gap(one.f(x) - target, one.f(new) - one.b))
        ratio = float((target - one.b).norm() / (new - x).norm() / torch.linalg.matrix_norm(one.a, 2))
        data = one.a + 10 ** (-(n % 3)) * torch.randn(one.a.shape, generator=generator, dtype=F64)
        other = float((one.f(x) - SoftmaxRegression(data, one.b).f(x)).norm() / (data - one.a).norm() / x.norm())
        worst = max(worst, ratio, other)
    # along the steepest direction at f = (1/2, 1/2) the constant is reached
    pair = SoftmaxRegression(torch.tensor([[1.0], [-1.0]], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64))
    step = torch.tensor([1e-4], dtype=F64)
    tight = float((pair.f(step) - pair.f(0 * step)).norm() / step.norm() / torch.linalg.matrix_norm(pair.a, 2))
    return max(*gaps, worst - 0.5, abs(tight - 0.5) - 1e-6), max(worst, tight) - 0.25


@check(
    "icl-softmax-regression",
    "centred keys: error of attention's first-order prediction as beta halves, away from halving (cosine over 0.97 at 0.05)",
    below=0.05,
    control="linear attention",
)
def _() -> tuple[float, float]:
    one, _ = problem(3)
    a = one.a - one.a.mean(0)
    queries = torch.randn(50, 8, generator=torch.Generator().manual_seed(2), dtype=F64)
    truth = torch.stack([sum((a[i] @ q) * (one.b[i] - 1 / 32) for i in range(32)) / 32 for q in queries])  # type: ignore[misc]

    def errors(kind: str) -> list[float]:
        return [float((attention_prediction(a, one.b, queries, beta, kind) - truth).norm() / truth.norm()) for beta in (0.1, 0.05, 0.025)]

    soft, linear = errors("softmax"), errors("linear")
    found = closeness_experiment(a, one.b)
    good = found.cosine > 0.97 and naive.gap(descent_prediction(a, one.b, queries), truth) < 1e-12
    good = good and found.weight_ratio <= found.weight_bound and found.data_ratio <= found.data_bound and found.data_shift > 0
    halving = max(abs(soft[1] / soft[0] - 0.5), abs(soft[2] / soft[1] - 0.5))
    return halving if good else 1.0, abs(linear[1] / max(linear[0], 1e-300) - 0.5)


@check("icl-softmax-regression", "the layer on the prompt by loops", below=1e-12, control="values without b")
def _() -> tuple[float, float]:
    one, _ = problem()
    truth = one.a.clone()
    plain = one.a + 0.5 * (2 * one.a @ one.a.T).softmax(-1) @ one.a
    for i in range(32):
        e = torch.stack([(2 * one.a[i] @ one.a[j]).exp() for j in range(32)])
        truth[i] += 0.5 * sum(e[j] / e.sum() * one.b[j] * one.a[j] for j in range(32))
    found = rewritten(one.a, one.b, beta=2.0, lr=0.5)
    return naive.gap(found, truth), naive.gap(plain, truth)


@check(
    "icl-softmax-regression",
    "trained layer against one descent step of the best rate: difference in length of their slopes by the query (cosine 0.9, error 1.5 times its)",
    below=0.25,
    control="before training",
)
def _() -> tuple[float, float]:
    found, start = trained_closeness(), trained_closeness(steps=0)
    good = found["cosine"] > 0.9 and found["error"] < 1.5 * found["descent"] and found["error"] < 0.6 * found["mean"]
    good = good and found["difference"] < start["difference"]
    return found["norms"] if good else 1.0, start["norms"]
