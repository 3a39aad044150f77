"""Transformers as support vector machines: training separates optimal tokens from the others (id 85; Tarzanagh et al., 2023).

f(X, z) = v^T X^T softmax(X W z),  W whole or K Q^T;  L(W) = mean_i l(Y_i f(X_i, z_i)), l logistic;  opt_i = argmax_t Y_i v^T x_it
W-SVM: min |W|_F, KQ-SVM: min |W|_*, both with (x_i,opt - x_it)^T W z_i >= 1 for all t != opt_i.   Gradient descent on W tends in direction
to the first.  Dual of the first: min_a>=0 a^T G a / 2 - 1^T a, W = sum_k a_k (x_opt - x_t) z^T.

Of three problems of 6 inputs of 8 tokens in 10 dimensions two come to a cosine of 0.99 with the W-SVM; in the third one input settles on a token that is
not optimal (0.80), and the weights tend to the SVM of the tokens selected (0.99), as the paper says of local directions.

Not built: MLP heads, and the two-part limit they have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import MissingDependency, RegardError
from regard.plots import Plot, figure
from regard.results import Column, Result


@dataclass(frozen=True)
class AttentionProblem:
    """tokens (n, T, d), z (n, d) queries, labels (n,) of +-1, v (d,) the head."""

    tokens: Tensor
    z: Tensor
    labels: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        n, _, d = self.tokens.shape if self.tokens.dim() == 3 else (-1, 0, 0)
        if self.z.shape != (n, d) or self.labels.shape != (n,) or self.v.shape != (d,):
            shapes = [tuple(x.shape) for x in (self.tokens, self.z, self.labels, self.v)]
            raise RegardError(f"tokens, z, labels, v have shapes {shapes}; expected (n, T, d), (n, d), (n,), (d,)")

    @property
    def scores(self) -> Tensor:
        """gamma (n, T) = Y v^T x."""
        return self.labels[:, None] * (self.tokens @ self.v)

    @property
    def optimal(self) -> Tensor:
        """(n,): the token of the greatest score."""
        return self.scores.argmax(1)

    def probabilities(self, w: Tensor) -> Tensor:
        """softmax(X W z), (n, T)."""
        return torch.einsum("ntd,de,ne->nt", self.tokens, w, self.z).softmax(1)

    def loss(self, w: Tensor) -> Tensor:
        return F.softplus(-(self.probabilities(w) * self.scores).sum(1)).mean()

    def constraints(self, chosen: Tensor | None = None) -> Tensor:
        """(m, d, d): (x_chosen - x_t) z^T of all t != chosen (None: the optimal tokens)."""
        at = self.optimal if chosen is None else chosen
        if at.shape != self.labels.shape or bool(((at < 0) | (at >= self.tokens.shape[1])).any()):
            raise RegardError(f"chosen={at.tolist()}; expected a number of a token for each input")
        own = self.tokens.gather(1, at[:, None, None].expand(-1, 1, self.tokens.shape[2]))
        apart = torch.ones_like(self.scores, dtype=torch.bool).scatter(1, at[:, None], False)
        return ((own - self.tokens)[..., None] * self.z[:, None, None])[apart]


def draw_problem(n: int = 3, tokens: int = 4, dim: int = 6, *, self_attention: bool = True, seed: int = 0) -> AttentionProblem:
    """Tokens on the unit sphere, labels +-1, z the first token of each input (or drawn: cross-attention), in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, tokens, dim, generator=generator, dtype=torch.float64), dim=-1)
    z = x[:, 0] if self_attention else F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.randint(2, (n,), generator=generator).double() * 2 - 1
    return AttentionProblem(x, z, labels, F.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0))


@dataclass(frozen=True)
class Margin(Result):
    """w (d, d); margins (m,), of 1 or more where `feasible`; objective: |W|_F or |W|_*."""

    w: Tensor
    margins: Tensor
    objective: float
    feasible: bool


def svm(problem: AttentionProblem, chosen: Tensor | None = None, *, steps: int = 20_000, tol: float = 1e-9) -> Margin:
    """The Frobenius SVM by accelerated projected gradient on its dual, for given tokens (None: the optimal ones)."""
    c = problem.constraints(chosen).flatten(1)
    gram = c @ c.T
    rate = 1 / float(torch.linalg.matrix_norm(gram, 2))
    a, ahead, t = torch.zeros(len(c), dtype=c.dtype), torch.zeros(len(c), dtype=c.dtype), 1.0
    for _ in range(steps):
        new = (ahead - rate * (gram @ ahead - 1)).clamp_min(0)
        later = (1 + (1 + 4 * t * t) ** 0.5) / 2
        if float((new - a) @ (ahead - new)) > 0:  # overshot: begin to gather speed anew
            later = 1.0
        ahead, still = new + (t - 1) / later * (new - a) * (later > 1), float((new - a).abs().max()) <= tol * rate
        a, t = new, later
        if still:
            break
    w = (a @ c).view(problem.tokens.shape[2], -1)
    return margin_of(problem, w, chosen, float(w.norm()))


def nuclear_svm(
    problem: AttentionProblem, chosen: Tensor | None = None, *, rank: int | None = None, starts: int = 4, seed: int = 0
) -> Margin:
    """The nuclear-norm SVM as min (|K|^2 + |Q|^2) / 2 over K, Q (d, rank), by SLSQP from several starts; needs SciPy."""
    try:
        import numpy as np
        from scipy.optimize import minimize
    except ImportError as missing:
        raise MissingDependency("nuclear_svm needs scipy: pip install 'regard[graphs]'") from missing
    c, d = problem.constraints(chosen).numpy(), problem.tokens.shape[2]
    r = d if rank is None else rank
    first, draws = svm(problem, chosen), np.random.default_rng(seed)
    u, s, vt = (x.numpy() for x in torch.linalg.svd(first.w))
    best = None
    for start in range(starts):
        at = np.concatenate(((u * s**0.5)[:, :r].ravel(), (vt.T * s**0.5)[:, :r].ravel()))
        at = at + (0.3 * draws.standard_normal(at.shape) if start else 1e-3 * draws.standard_normal(at.shape))

        def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return x[: d * r].reshape(d, r), x[d * r :].reshape(d, r)

        def gaps(x: np.ndarray) -> np.ndarray:
            k, q = split(x)
            return np.einsum("mde,dr,er->m", c, k, q) - 1

        def slopes(x: np.ndarray) -> np.ndarray:
            k, q = split(x)
            by_k, by_q = np.einsum("mde,er->mdr", c, q), np.einsum("mde,dr->mer", c, k)
            return np.concatenate((by_k.reshape(len(c), -1), by_q.reshape(len(c), -1)), 1)

        held = {"type": "ineq", "fun": gaps, "jac": slopes}
        found = minimize(
            lambda x: 0.5 * x @ x, at, jac=lambda x: x, constraints=[held], method="SLSQP", options={"maxiter": 1000, "ftol": 1e-14}
        )
        if gaps(found.x).min() > -1e-6 and (best is None or found.fun < best.fun):
            best = found
    if best is None:
        raise RegardError("no weights of this rank satisfy the constraints; expected a greater rank, or tokens that can be separated")
    k, q = (torch.from_numpy(x) for x in (best.x[: d * r].reshape(d, r), best.x[d * r :].reshape(d, r)))
    return margin_of(problem, k @ q.T, chosen, float(best.fun))


def margin_of(problem: AttentionProblem, w: Tensor, chosen: Tensor | None, objective: float) -> Margin:
    margins = torch.einsum("mde,de->m", problem.constraints(chosen), w)
    return Margin(w, margins, objective, bool(margins.min() >= 1 - 1e-5))


@dataclass
class Run(Result):
    """w: the last weights; correlation: cosine of W_t with the SVM's solution for the optimal tokens, by step; selected (n,): the token with the
    greatest weight at the end; optimal: whether it is the optimal one; local: cosine with the SVM of the selected tokens."""

    w: Tensor
    correlation: list[float] = field(default_factory=list)
    selected: Tensor = field(default_factory=lambda: torch.empty(0))
    optimal: Tensor = field(default_factory=lambda: torch.empty(0))
    local: float = float("nan")

    def columns(self) -> dict[str, Column]:
        return {"step": range(len(self.correlation)), "correlation": self.correlation}

    def plot(self) -> Plot:
        """The correlation by step."""
        return figure(
            "Towards the max-margin direction", "step", "cosine", {"cosine": [(float(n), x) for n, x in enumerate(self.correlation)]}
        )


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@register("attention-svm", kind="experiment")
def descend(
    problem: AttentionProblem,
    *,
    lr: float = 0.1,
    steps: int = 600,
    normalised: bool = True,
    rank: int | None = None,
    init: float = 0.0,
    stop: float = 1e-8,
    seed: int = 0,
) -> Run:
    """Gradient descent on W from init times noise (normalised: steps of length lr), or, with a rank, on K, Q (d, rank) with W = K Q^T.
    stop: when every selected token has a probability above 1 - stop, before gradients underflow. RegardError for a whole W from init=0 with
    a rank, which cannot move."""
    d, generator = problem.tokens.shape[2], torch.Generator().manual_seed(seed)
    if rank is not None and init == 0:
        raise RegardError("init=0.0 with a rank is a saddle; expected init above 0")
    shapes = [(d, d)] if rank is None else [(d, rank)] * 2
    parts = [(init * torch.randn(shape, generator=generator, dtype=problem.z.dtype)).requires_grad_() for shape in shapes]

    def whole() -> Tensor:
        return parts[0] if rank is None else parts[0] @ parts[1].T

    aim = svm(problem)
    run = Run(whole().detach())
    for _ in range(steps):
        slopes = torch.autograd.grad(problem.loss(whole()), parts)
        length = torch.cat([g.flatten() for g in slopes]).norm() if normalised else 1.0
        with torch.no_grad():
            for p, g in zip(parts, slopes, strict=True):
                p -= lr * g / length
        run.correlation.append(cosine(whole().detach(), aim.w))
        if float(problem.probabilities(whole().detach()).amax(1).min()) > 1 - stop:
            break
    run.w = whole().detach()
    run.selected = problem.probabilities(run.w).argmax(1)
    run.optimal = run.selected == problem.optimal
    run.local = cosine(run.w, svm(problem, run.selected).w)
    return run
