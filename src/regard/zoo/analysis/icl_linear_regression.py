"""Linear regression in context by softmax heads: what they learn is debiased gradient descent (id 20; He et al., 2025).

Prompt x_l ~ N(0, S), beta ~ N(0, I / d), y_l = beta^T x_l + sigma eps, z_l = (x_l, y_l), query (x_q, 0):  y^ = last entry of
sum_h O_h V_h Z softmax(Z^T K_h^T Q_h z_q / sqrt(d + 1)).   Learned: KQ_h = diag(omega_h I, 0), OV_h = mu_h in the last entry, sum mu = 0;
y^ = sum_h mu_h sum_l softmax_l(omega_h x_l^T x_q) y_l;  heads (+-w, +-m): (2 w m / L) sum_l y_l (x_l - mean x)^T x_q + O(w^3)
risk(omega, mu) = 1 + s^2 - 2 mu.omega + mu^T [omega omega^T + (1 + s^2) / L exp(d omega omega^T)] mu

With 5 dimensions, 40 examples and 3000 steps of 256 one and two heads are diagonal (0.06 of it stands beside the diagonal) and sum mu is 0.005 of the
largest of two heads; of four heads sum mu is 0.02, but one is not diagonal yet (1.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.results import Result
from regard.tasks.training import fit

Prompt = tuple[Tensor, Tensor, Tensor, Tensor]


def regression_prompts(
    count: int,
    length: int = 40,
    dim: int = 5,
    *,
    sigma: float = 0.1,
    rho: float = 0.0,
    tasks: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Prompt:
    """(x (B, L, d), y (B, L, tasks), x_q (B, d), y_q (B, tasks)). rho: inputs have covariance rho^|i - j|. All y have
    noise, that of the query too."""
    if not -1 < rho < 1 or min(count, length, dim, tasks) < 1:
        raise RegardError(f"rho={rho}, count={count}, length={length}, dim={dim}, tasks={tasks}; expected -1 < rho < 1 and positive sizes")
    x = torch.randn(count, length + 1, dim, generator=generator, dtype=dtype)
    if rho:
        at = torch.arange(dim)
        x = x @ torch.linalg.cholesky(rho ** (at[:, None] - at).abs().to(dtype)).T
    beta = torch.randn(count, dim, tasks, generator=generator, dtype=dtype) / dim**0.5
    y = x @ beta + sigma * torch.randn(count, length + 1, tasks, generator=generator, dtype=dtype)
    return x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]


@register("icl-linear-regression", kind="module")
class RegressionHeads(nn.Module):
    """x (B, L, d), y (B, L, tasks), x_q (B, d) -> (B, tasks): `heads` softmax heads, each with Q, K (r, d + tasks), V (r, d + tasks) and
    O (tasks, r); no bias, no residual, the query not among the keys. r: d + tasks. normalizer: "softmax", or "linear" (scores over L)."""

    def __init__(self, dim: int = 5, heads: int = 1, tasks: int = 1, normalizer: str = "softmax", std: float | None = None):
        super().__init__()
        if normalizer not in ("softmax", "linear"):
            raise RegardError(f"normalizer={normalizer!r}; expected softmax or linear")
        size = dim + tasks
        spread = size**-0.5 if std is None else std
        self.dim, self.tasks, self.normalizer = dim, tasks, normalizer
        self.q, self.k, self.v = (nn.Parameter(spread * torch.randn(heads, size, size)) for _ in range(3))
        self.out = nn.Parameter(spread * torch.randn(heads, tasks, size))

    @takes(x="batch length dim", y="batch length tasks", query="batch dim")
    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        z = torch.cat((x, y), 2)
        asked = torch.cat((query, query.new_zeros(len(query), self.tasks)), 1)
        scores = torch.einsum("bls,hse,be->bhl", z, self.qk().transpose(1, 2), asked)
        weights = scores.softmax(-1) if self.normalizer == "softmax" else scores / x.shape[1]
        return torch.einsum("hts,bls,bhl->bt", self.ov(), z, weights)

    def qk(self) -> Tensor:
        """Q^T K over sqrt(r), (H, d + tasks, d + tasks): z_q^T qk z_l is the score."""
        return torch.einsum("hrs,hrt->hst", self.q, self.k) / self.q.shape[1] ** 0.5

    def ov(self) -> Tensor:
        """(H, tasks, d + tasks)."""
        return torch.einsum("htr,hrs->hts", self.out, self.v)


@torch.no_grad()
def planted_heads(omega: Tensor, mu: Tensor, dim: int) -> RegressionHeads:
    """Heads of KQ = diag(omega_h I, 0) and OV = mu_h in the last entry."""
    if omega.shape != mu.shape or omega.dim() != 1:
        raise RegardError(f"omega {tuple(omega.shape)}, mu {tuple(mu.shape)}: expected (H,) both")
    model = RegressionHeads(dim, len(omega)).to(omega.dtype)
    keep = torch.eye(dim + 1, dtype=omega.dtype)
    keep[-1, -1] = 0
    model.q.copy_(omega[:, None, None] * (dim + 1) ** 0.5 * keep)
    model.k.copy_(keep.expand_as(model.k))
    last = torch.zeros(dim + 1, dtype=omega.dtype)
    last[-1] = 1.0
    model.v.copy_(torch.outer(last, last).expand_as(model.v))
    model.out.copy_(mu[:, None, None] * last)
    return model


@dataclass(frozen=True)
class Pattern(Result):
    """omega, mu (H,): of each head, one task. off: the largest entry of KQ off its diagonal that a query meets, over |omega|;
    spread: of its diagonal over |omega|; other: the largest entry of OV besides mu, over |mu|; balance: |sum mu| / max |mu|."""

    omega: Tensor
    mu: Tensor
    off: float
    spread: float
    other: float
    balance: float


@torch.no_grad()
def head_pattern(model: RegressionHeads) -> Pattern:
    if model.tasks != 1:
        raise RegardError(f"the model has {model.tasks} tasks; expected one, for omega and mu to be numbers")
    d, qk, ov = model.dim, model.qk(), model.ov()[:, 0]
    diagonal = qk[:, :d, :d].diagonal(0, 1, 2)
    omega, mu = diagonal.mean(1), ov[:, d]
    rest = qk.clone()
    rest[:, range(d), range(d)] = 0
    size = omega.abs().mean()
    return Pattern(
        omega,
        mu,
        float(rest[:, :d].abs().max() / size),  # the query's own y is 0: its row meets nothing
        float((diagonal - omega[:, None]).abs().max() / size),
        float(ov[:, :d].abs().max() / mu.abs().max()),
        float(mu.sum().abs() / mu.abs().max()),
    )


def descent(x: Tensor, y: Tensor, query: Tensor, rate: float, debiased: bool = True) -> Tensor:
    """One step of gradient descent from 0: rate / L sum_l y_l (x_l - mean x)^T x_q, or without the mean taken off."""
    centred = x - x.mean(1, keepdim=True) if debiased else x
    return rate / x.shape[1] * torch.einsum("blt,bld,bd->bt", y, centred, query)


def ridge(x: Tensor, y: Tensor, query: Tensor, strength: float) -> Tensor:
    """Bayes-optimal for strength = sigma^2 d: x_q^T (X^T X + strength I)^{-1} X^T y."""
    gram = x.transpose(1, 2) @ x + strength * torch.eye(x.shape[2], dtype=x.dtype)
    return torch.einsum("bd,bdt->bt", query, torch.linalg.solve(gram, x.transpose(1, 2) @ y))


def best_mu(omega: Tensor, length: int, dim: int, sigma: float) -> Tensor:
    """The minimiser of the approximate risk for given omega (H,)."""
    return torch.linalg.solve(risk_matrix(omega, length, dim, sigma), omega)


def risk_matrix(omega: Tensor, length: int, dim: int, sigma: float) -> Tensor:
    both = torch.outer(omega, omega)
    return both + (1 + sigma**2) / length * (dim * both).exp()


def approximate_risk(omega: Tensor, mu: Tensor, length: int, dim: int, sigma: float) -> Tensor:
    return 1 + sigma**2 - 2 * mu @ omega + mu @ risk_matrix(omega, length, dim, sigma) @ mu


def train_regression(
    heads: int = 2,
    dim: int = 5,
    length: int = 40,
    *,
    sigma: float = 0.1,
    rho: float = 0.0,
    tasks: int = 1,
    normalizer: str = "softmax",
    steps: int = 3000,
    batch: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
) -> RegressionHeads:
    """Heads trained by Adam on fresh prompts, mean squared error of the query."""
    torch.manual_seed(seed)
    model = RegressionHeads(dim, heads, tasks, normalizer)

    def draw(generator: torch.Generator) -> Prompt:
        return regression_prompts(batch, length, dim, sigma=sigma, rho=rho, tasks=tasks, generator=generator)

    fit(model, draw, lambda p: (model(*p[:3]) - p[3]).square().mean(), steps, lr=lr, seed=seed)
    return model
