"""Computational limits of LoRA: gradients of attention's adapters in almost linear time, while logits are small (id 189; Hu et al., 2024).

Lo(A, B) = 1/2 || f h - Y ||^2,  f = rowsoftmax(S),  S = X1 (W + (alpha / r) B A) X2^T / d,  h = X3 W_V
c = f h - Y;  p = f * (c h^T) - diag((f * (c h^T)) 1) f;  dLo/dW = X1^T p X2 / d;  dA = (alpha / r) B^T dW,  dB = (alpha / r) dW A^T
e^x ~ sum_{n<=g} x^n / n!, whose monomials of d channels are features: exp(S) ~ U V^T of rank C(d + g, g); every product then runs from the
right and no (L, L) is made. The degree for a fixed error grows with the largest logit, and the rank with it.
Not built: the full case, with adapters of W_K and W_V too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError


@dataclass(frozen=True)
class Adapted:
    """x1, x2, x3 (L, d), y (L, dv), w (d, d), w_v (d, dv), a (r, d), b (d, r)."""

    x1: Tensor
    x2: Tensor
    x3: Tensor
    y: Tensor
    w: Tensor
    w_v: Tensor
    a: Tensor
    b: Tensor
    alpha: float = 1.0

    def __post_init__(self) -> None:
        length, d = self.x1.shape
        r, wanted = (
            self.a.shape[0],
            {"x2": (length, d), "x3": (length, d), "w": (d, d), "b": (d, self.a.shape[0]), "a": (self.a.shape[0], d)},
        )
        wanted |= {"w_v": (d, self.y.shape[1]), "y": (length, self.y.shape[1])}
        wrong = [name for name, shape in wanted.items() if getattr(self, name).shape != shape]
        if wrong or r < 1:
            raise RegardError(f"{', '.join(wrong) or 'a'}: expected shapes {wanted} for x1 {tuple(self.x1.shape)} and rank {r}")

    @property
    def scale(self) -> float:
        return self.alpha / self.a.shape[0]

    def queries(self) -> Tensor:
        """X1 (W + (alpha / r) B A) / d, so that S = queries X2^T."""
        return self.x1 @ (self.w + self.scale * self.b @ self.a) / self.x1.shape[1]

    def loss(self) -> Tensor:
        f = (self.queries() @ self.x2.T).softmax(-1)
        return (f @ (self.x3 @ self.w_v) - self.y).square().sum() / 2

    def adapters(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """dA, dB of dLo/dW."""
        return self.scale * self.b.T @ slope, self.scale * slope @ self.a.T


def exact_gradients(given: Adapted, degree: int | None = None) -> tuple[Tensor, Tensor]:
    """dA (r, d), dB (d, r) in the closed form over (L, L) matrices. degree: the exponential replaced by its Taylor polynomial."""
    s = given.queries() @ given.x2.T
    u = s.exp() if degree is None else taylor(s, degree)
    f, h = u / u.sum(-1, keepdim=True), given.x3 @ given.w_v
    q = (f @ h - given.y) @ h.T
    p = f * q
    p = p - p.sum(-1, keepdim=True) * f
    return given.adapters(given.x1.T @ p @ given.x2 / given.x1.shape[1])


def taylor(x: Tensor, degree: int) -> Tensor:
    """sum_{n <= degree} x^n / n!."""
    if degree < 1:
        raise RegardError(f"degree={degree}: expected at least 1")
    total = torch.ones_like(x)
    for n in range(degree, 0, -1):
        total = 1 + x * total / n
    return total


def features(x: Tensor, degree: int, weighed: bool) -> Tensor:
    """All monomials of x (L, d) up to a degree, (L, C(d + degree, degree)); weighed: times 1 / (m_1! ... m_d!), so that a weighed and a plain
    table multiply to the Taylor polynomial of the inner products."""
    d, columns = x.shape[1], []
    for n in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(d), n):
            counts = [chosen.count(at) for at in range(d)]
            column = torch.stack([x[:, at] ** m for at, m in enumerate(counts)]).prod(0)
            columns.append(column / math.prod(math.factorial(m) for m in counts) if weighed else column)
    return torch.stack(columns, 1)


@register("lora-computational-limits", kind="experiment")
def lora_gradients(given: Adapted, degree: int) -> tuple[Tensor, Tensor]:
    """dA (r, d), dB (d, r) through polynomial features: time O(L k dv d), memory O(L k), k = C(d + degree, degree). RegardError where the
    polynomial leaves a row without mass, which a higher degree mends."""
    if degree < 1:
        raise RegardError(f"degree={degree}: expected at least 1")
    u, v = features(given.queries(), degree, True), features(given.x2, degree, False)
    h = given.x3 @ given.w_v
    mass = (u @ v.sum(0))[:, None]
    if not bool((mass > 0).all()):
        raise RegardError(
            f"degree={degree}: the polynomial's rows do not have positive sums; expected a higher degree for logits this large"
        )
    u = u / mass
    read = u @ (v.T @ h)
    c = read - given.y
    slope = -((c * read).sum(-1, keepdim=True) * given.x1).T @ (u @ (v.T @ given.x2))
    for at in range(h.shape[1]):  # the rank of c h^T, a column at a time
        slope = slope + (given.x1 * c[:, at : at + 1]).T @ (u @ (v.T @ (h[:, at : at + 1] * given.x2)))
    return given.adapters(slope / given.x1.shape[1])


def rank_of(dim: int, degree: int) -> int:
    """C(dim + degree, degree)."""
    return math.comb(dim + degree, degree)


def degree_for(s: Tensor, gamma: float, error: float = 1e-3, most: int = 60) -> int:
    """The least degree at which L max |P - P_g| < error, for logits s (L, L) rescaled to a largest size of gamma; P their softmax."""
    s = s.double() * (gamma / s.abs().max())
    truth = s.softmax(-1)
    for degree in range(1, most + 1):
        u = taylor(s, degree)
        if float((u / u.sum(-1, keepdim=True) - truth).abs().max()) * len(s) < error:
            return degree
    raise RegardError(f"gamma={gamma}: no degree up to {most} has an error below {error}")


def lora_limits(
    s: Tensor, dim: int, gammas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0), error: float = 1e-3
) -> list[dict[str, float]]:
    """A row for every bound: gamma, degree, rank, and whether the rank is below the length (worthwhile)."""
    rows = []
    for gamma in gammas:
        degree = degree_for(s, gamma, error)
        rank = rank_of(dim, degree)
        rows.append({"gamma": gamma, "degree": degree, "rank": rank, "worthwhile": float(rank < len(s))})
    return rows
