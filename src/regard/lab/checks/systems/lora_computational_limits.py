"""Checks of lora-computational-limits."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.zoo.systems.lora_computational_limits import Adapted, exact_gradients, features, lora_gradients, lora_limits, rank_of, taylor


def given(length: int = 64, size: float = 1.0) -> Adapted:
    x1, x2, x3 = (torch.randn(length, 4, dtype=F64) * size**0.5 for _ in range(3))
    shapes = ((length, 3), (4, 4), (4, 3), (2, 4), (4, 2))
    y, w, w_v, a, b = (torch.randn(shape, dtype=F64) for shape in shapes)
    return Adapted(x1, x2, x3, y, w, w_v, a, b, alpha=3.0)


def gap(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@check(
    "lora-computational-limits",
    "closed-form gradients of both adapters: gap to autograd of the loss in the open",
    below=1e-9,
    control="without the softmax's own sums",
)
def _() -> tuple[float, float]:
    one = given()
    a, b = (x.clone().requires_grad_() for x in (one.a, one.b))
    s = one.x1 @ (one.w + 1.5 * b @ a) @ one.x2.T / 4
    e = torch.exp(s - s.amax(-1, keepdim=True))
    loss = ((e / e.sum(-1, keepdim=True)) @ one.x3 @ one.w_v - one.y).square().sum() / 2
    truth = torch.autograd.grad(loss, (a, b))
    assert abs(float(loss.detach() - one.loss())) < 1e-9
    f, h = s.softmax(-1).detach(), one.x3 @ one.w_v
    bare = one.x1.T @ (f * ((f @ h - one.y) @ h.T)) @ one.x2 / 4
    return gap(exact_gradients(one), truth), gap(one.adapters(bare), truth)


@check(
    "lora-computational-limits",
    "through features: gap to (L, L) matrices of the same polynomial, degrees 1 to 6",
    below=1e-9,
    control="the exponential itself",
)
def _() -> tuple[float, float]:
    one, own = given(size=0.3), 0.0
    for degree in (2, 3, 6):
        own = max(own, gap(lora_gradients(one, degree), exact_gradients(one, degree)))
    u, v = features(one.queries(), 3, True), features(one.x2, 3, False)
    s = one.queries() @ one.x2.T
    own = max(own, naive.gap(u @ v.T, 1 + s + s**2 / 2 + s**3 / 6), naive.gap(taylor(s, 3), 1 + s + s**2 / 2 + s**3 / 6))
    assert u.shape[1] == v.shape[1] == rank_of(4, 3) == 35
    return own, gap(lora_gradients(one, 2), exact_gradients(one))


@check("lora-computational-limits", "L = 600, degree 2: largest tensor over 8 L k", below=1.0, control="matrices of all pairs")
def _() -> tuple[float, float]:
    one = given(600, 0.2)
    limit = 8 * 600 * rank_of(4, 2)
    return largest_tensor(lambda: lora_gradients(one, 2)) / limit, largest_tensor(lambda: exact_gradients(one, 2)) / (limit / 6)


@check(
    "lora-computational-limits", "relative error of gradients at degree 8, falling from degree to degree", below=1e-3, control="at degree 2"
)
def _() -> tuple[float, float]:
    one = given(256, 0.2)
    truth = exact_gradients(one)
    errors = [gap(lora_gradients(one, degree), truth) for degree in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    return errors[-1], errors[0]


@check(
    "lora-computational-limits",
    "degree needed at a largest logit of 8 over that at 0.5, L = 256",
    above=4.0,
    control="twice the error allowed, the same logits",
)
def _() -> tuple[float, float]:
    s = torch.randn(256, 4, dtype=F64) @ torch.randn(4, 256, dtype=F64)
    rows = lora_limits(s, 4)
    degrees = [row["degree"] for row in rows]
    assert degrees == sorted(degrees) and rows[0]["worthwhile"] == 1 and rows[-1]["worthwhile"] == 0
    assert all(row["rank"] == rank_of(4, int(row["degree"])) for row in rows)
    same = [lora_limits(s, 4, (0.5,), error)[0]["degree"] for error in (1e-3, 2e-3)]
    return degrees[-1] / degrees[0], same[0] / same[1]
