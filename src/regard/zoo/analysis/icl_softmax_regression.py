"""Softmax regression in context: a step on the weights, or one attention layer on the data, move the target alike (id 7; Li et al., 2023).

f(A, x) = exp(Ax) / <exp(Ax), 1>,  L = |f - b|^2 / 2,  dL/dx = A^T (diag f - f f^T)(f - b),  dL/dA = ((diag f - f f^T)(f - b)) x^T
Moving x to x' is keeping x with the target b + f(A, x) - f(A, x'), at most |A| / 2 |x - x'| away; moving A likewise, at most |x| / 2 |A - A'|.
With centred keys, (softmax attention of a_q over (a_i, b_i) at inverse temperature beta - mean b) / beta is a_q . (one step from 0) + O(beta).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.results import Result
from regard.tasks.training import fit


@dataclass(frozen=True)
class SoftmaxRegression:
    """a (n, d), b (n,): min over x (d,) of |softmax(a x) - b|^2 / 2."""

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.shape != self.a.shape[:1]:
            raise RegardError(f"a {tuple(self.a.shape)}, b {tuple(self.b.shape)}: expected (n, d) and (n,)")

    def f(self, x: Tensor) -> Tensor:
        return (self.a @ x).softmax(-1)

    def loss(self, x: Tensor) -> Tensor:
        return 0.5 * (self.f(x) - self.b).square().sum()

    def pulled(self, f: Tensor, c: Tensor) -> Tensor:
        """(diag f - f f^T) c."""
        return f * c - f * (f @ c)

    def gradient(self, x: Tensor) -> Tensor:
        f = self.f(x)
        return self.a.T @ self.pulled(f, f - self.b)

    def data_gradient(self, x: Tensor) -> Tensor:
        """dL/dA, (n, d)."""
        f = self.f(x)
        return torch.outer(self.pulled(f, f - self.b), x)

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """H v, without H: J^T J v + A^T d[(diag f - f f^T)] c along v, J = (diag f - f f^T) A."""
        f, av = self.f(x), self.a @ v
        c, df = f - self.b, self.pulled(f, av)
        turned = df * c - df * (f @ c) - f * (df @ c)
        return self.a.T @ (self.pulled(f, df) + turned)

    def descend(self, x: Tensor, lr: float, steps: int = 1) -> Tensor:
        for _ in range(steps):
            x = x - lr * self.gradient(x)
        return x

    def moved_target(self, x: Tensor, new: Tensor) -> Tensor:
        """The target under which x has the residual that `new` has under b."""
        return self.b + self.f(x) - self.f(new)


def rewritten(a: Tensor, b: Tensor, beta: float = 1.0, lr: float = 1.0) -> Tensor:
    """Data behind one softmax self-attention layer on the prompt, scores beta a_i.a_j, values b_j a_j: A + lr (softmax(beta A A^T) (b A))."""
    return a + lr * (beta * a @ a.T).softmax(-1) @ (b[:, None] * a)


@dataclass(frozen=True)
class Closeness(Result):
    """weight_shift, data_shift: |b~ - b| of one descent step and of one attention layer, with their ratios to |x - x'| and |A - A'| and
    the bounds |A| / 2 and |x| / 2 on these. cosine, relative: of attention's first-order prediction with descent's over random queries."""

    weight_shift: float
    data_shift: float
    weight_ratio: float
    data_ratio: float
    weight_bound: float
    data_bound: float
    cosine: float
    relative: float


def attention_prediction(a: Tensor, b: Tensor, queries: Tensor, beta: float, kind: str = "softmax") -> Tensor:
    """(o(beta) - mean b) / beta of queries (m, d), keys a centred: kind "softmax", or "linear" (1 + scores, over n)."""
    if kind not in ("softmax", "linear") or beta <= 0:
        raise RegardError(f"kind={kind!r}, beta={beta}; expected softmax or linear, and above 0")
    scores = beta * queries @ (a - a.mean(0)).T
    weights = scores.softmax(-1) if kind == "softmax" else (1 + scores) / len(a)
    return (weights @ b - b.mean()) / beta


def descent_prediction(a: Tensor, b: Tensor, queries: Tensor) -> Tensor:
    """a_q . x behind one step of rate 1 from x = 0: (1 / n) sum_i (a_i - mean a).a_q (b_i - 1 / n)."""
    problem = SoftmaxRegression(a, b)
    return queries @ problem.descend(torch.zeros_like(a[0]), 1.0)


@register("icl-softmax-regression", kind="experiment")
def closeness_experiment(
    a: Tensor, b: Tensor, x: Tensor | None = None, *, lr: float = 1.0, beta: float = 0.05, queries: int = 50, seed: int = 0
) -> Closeness:
    """A problem a (n, d), b (n,) at weights x (None: drawn): how far a descent step and an attention layer move its target, and how near the
    two predictors are to each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(a.shape[1], generator=generator, dtype=a.dtype) if x is None else x
    problem, data = SoftmaxRegression(a, b), rewritten(a, b, lr=lr)
    new = problem.descend(x, lr)
    moved, shifted = problem.moved_target(x, new) - b, problem.f(x) - SoftmaxRegression(data, b).f(x)
    points = torch.randn(queries, a.shape[1], generator=generator, dtype=a.dtype)
    ours, theirs = attention_prediction(a, b, points, beta), descent_prediction(a, b, points)
    return Closeness(
        float(moved.norm()),
        float(shifted.norm()),
        float(moved.norm() / (new - x).norm()),
        float(shifted.norm() / (data - a).norm()),
        float(torch.linalg.matrix_norm(a, 2) / 2),
        float(x.norm() / 2),
        float(F.cosine_similarity(ours, theirs, dim=0)),
        float((ours - theirs).norm() / theirs.norm()),
    )


class InContext(nn.Module):
    """keys (B, n, d), values (B, n), query (B, d) -> (B,): one softmax head, learned query-key matrix, value and shift."""

    def __init__(self, dim: int):
        super().__init__()
        self.w, self.scale, self.shift = nn.Parameter(0.1 * torch.eye(dim)), nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        scores = torch.einsum("bnd,de,be->bn", keys, self.w, query)
        return self.scale * (scores.softmax(-1) * values).sum(-1) + self.shift


def prompts(count: int, n: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax-regression prompts: keys, values n f(A, x), a query and its value n exp(a_q x) / <exp(Ax), 1>."""
    keys, query = torch.randn(count, n, dim, generator=generator), torch.randn(count, dim, generator=generator)
    x = torch.randn(count, dim, generator=generator) / dim**0.5 * 0.5
    rates = torch.einsum("bnd,bd->bn", keys, x).exp()
    own = torch.einsum("bd,bd->b", query, x).exp()
    return keys, n * rates / rates.sum(1, keepdim=True), query, n * own / rates.sum(1)


def trained_closeness(
    n: int = 32, dim: int = 4, *, steps: int = 300, batch: int = 128, lr: float = 3e-2, seed: int = 0
) -> dict[str, float]:
    """One layer trained on random prompts against one descent step from 0 of the best rate: mean squared "error" of it, of "descent" and of
    the "mean" of the values, "difference" of predictions, "cosine" and "norms" (difference) of d prediction / d query."""
    torch.manual_seed(seed)
    model = InContext(dim)
    fit(model, lambda g: prompts(batch, n, dim, g), lambda p: (model(*p[:3]) - p[3]).square().mean(), steps, lr=lr, seed=seed)
    keys, values, query, y = prompts(2000, n, dim, torch.Generator().manual_seed(seed + 999))
    query.requires_grad_()
    out = model(keys, values, query)
    centred = keys - keys.mean(1, keepdim=True)
    step = torch.einsum("bnd,bn->bd", centred, values - values.mean(1, keepdim=True)) / n
    raw = (query * step).sum(-1)
    mean = values.mean(1)
    rate = ((y - mean) * raw).sum() / raw.square().sum()
    descent = mean + rate.detach() * raw
    slopes = [torch.autograd.grad(z.sum(), query, retain_graph=True)[0] for z in (out, descent)]
    found = {"error": (out - y).square().mean(), "descent": (descent - y).square().mean(), "mean": (mean - y).square().mean()}
    found |= {"difference": (out - descent).square().mean().sqrt(), "cosine": F.cosine_similarity(slopes[0], slopes[1], dim=1).mean()}
    found["norms"] = (slopes[0].norm(dim=1) - slopes[1].norm(dim=1)).abs().mean()
    return {name: float(x.detach()) for name, x in found.items()}
