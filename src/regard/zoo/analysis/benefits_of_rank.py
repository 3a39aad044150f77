"""On the benefits of rank in attention: the nearest point needs one full-rank head, or exponentially many low-rank ones (id 86; 2024).

g(X, y) = argmax_{x in X} <x, y> on the sphere.   head h: A = softmax(y^T Q_h^T K_h x_n / sqrt(r)), Q, K in R^{r x d}; sum_h VO_h sum_n A_n x_n,
VO in R^{d x d}; hard heads: the argmax.   r = d, Q = tau I, K = VO = I solves it for tau -> infinity.
Rank-1 hard heads, N = 2: E<head, head'> = 1/2 + (2/pi^2) asin(q.q') asin(k.k');  error of the best weights 1 - b^T C^{-1} b
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.plots import Plot, figure
from regard.results import Column, Result

GEOMETRIES = ("uniform", "orthonormal", "doubled")


def nearest_points(
    count: int, dim: int, n: int, queries: int = 1, geometry: str = "uniform", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(X (B, d, N), Y (B, d, Nq), the nearest point of each query (B, d, Nq)). geometry: points "uniform" on the sphere, "orthonormal"
    (N <= d), or "doubled": N / 2 uniform ones and their negatives."""
    if geometry not in GEOMETRIES or (geometry == "orthonormal" and n > dim) or (geometry == "doubled" and n % 2):
        raise RegardError(
            f"geometry={geometry!r}, n={n}, dim={dim}: expected {', '.join(GEOMETRIES)}; orthonormal n <= dim, doubled n even"
        )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, n // 2 if geometry == "doubled" else n, generator=generator, dtype=dtype)
    x = torch.linalg.qr(x).Q if geometry == "orthonormal" else F.normalize(x, dim=1)
    x = torch.cat((x, -x), 2) if geometry == "doubled" else x
    y = F.normalize(torch.randn(count, dim, queries, generator=generator, dtype=dtype), dim=1)
    return x, y, chosen(x, (x.transpose(1, 2) @ y).argmax(1))


def farthest_points(x: Tensor) -> Tensor:
    """The self variant: for every point of X (B, d, N) the one farthest from it."""
    return chosen(x, (x.transpose(1, 2) @ x).argmin(1))


def chosen(x: Tensor, at: Tensor) -> Tensor:
    """x (B, d, N) at numbers (B, Nq): (B, d, Nq)."""
    return x.gather(2, at[:, None].expand(-1, x.shape[1], -1))


@register("benefits-of-rank", kind="module")
class RankedHeads(nn.Module):
    """X (B, d, N), Y (B, d, Nq) -> (B, d, Nq): `heads` heads of any rank with full d x d value-output matrices. hard: the argmax of scores, no
    gradient to queries and keys. Initial entries uniform in +-sqrt(6 / (r + d)) and +-sqrt(6 / (H d + d))."""

    def __init__(self, dim: int, rank: int, heads: int, hard: bool = False):
        super().__init__()
        if min(dim, rank, heads) < 1:
            raise RegardError(f"dim={dim}, rank={rank}, heads={heads}; expected 1 or more")
        self.dim, self.hard = dim, hard
        near, wide = (6 / (rank + dim)) ** 0.5, (6 / (heads * dim + dim)) ** 0.5
        self.q, self.k = (nn.Parameter(torch.empty(heads, rank, dim).uniform_(-near, near)) for _ in range(2))
        self.vo = nn.Parameter(torch.empty(heads, dim, dim).uniform_(-wide, wide))

    @takes(x="batch dim points", y="batch dim queries")
    def attended(self, x: Tensor, y: Tensor) -> Tensor:
        """What each head picks, (B, H, d, Nq), before its value-output matrix."""
        keys, queries = torch.einsum("hrd,bdn->bhrn", self.k, x), torch.einsum("hrd,bdq->bhrq", self.q, y)
        scores = torch.einsum("bhrn,bhrq->bhnq", keys, queries) / self.q.shape[1] ** 0.5
        pick = F.one_hot(scores.argmax(2), x.shape[2]).transpose(2, 3).to(x) if self.hard else scores.softmax(2)
        return torch.einsum("bdn,bhnq->bhdq", x, pick)

    @takes(x="batch dim points", y="batch dim queries")
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("hde,bheq->bdq", self.vo, self.attended(x, y))


@torch.no_grad()
def perfect_head(dim: int, tau: float = 1e4) -> RankedHeads:
    """One full-rank head that finds the nearest point: Q = tau I, K = VO = I."""
    model = RankedHeads(dim, dim, 1)
    for p, factor in ((model.q, tau), (model.k, 1.0), (model.vo, 1.0)):
        p.copy_(factor * torch.eye(dim)[None])
    return model


@torch.no_grad()
def random_heads(dim: int, rank: int, heads: int, seed: int = 0) -> RankedHeads:
    """Hard heads of random orthonormal queries, K = Q, outputs unweighted (VO = I): what `best_weights` then combines."""
    model, generator = RankedHeads(dim, rank, heads, hard=True), torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(heads, dim, rank, generator=generator)).Q.transpose(1, 2)
    model.q.copy_(q)
    model.k.copy_(q)
    model.vo.copy_(torch.eye(dim).expand_as(model.vo))
    return model


@torch.no_grad()
def best_weights(model: RankedHeads, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(H,): the numbers by which heads' outputs add up nearest to the target, by least squares; they are put into VO = a_h I."""
    picked = model.attended(x, y).transpose(0, 1).flatten(1).double()
    a = torch.linalg.lstsq(picked.T, target.flatten().double()[:, None]).solution[:, 0]
    model.vo.copy_(a[:, None, None] * torch.eye(model.vo.shape[1]))
    return a


@torch.no_grad()
def mse(model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> float:
    """|output - target|^2 a query, over |target|^2."""
    return float((model(x, y) - target).square().sum(1).mean() / target.square().sum(1).mean())


def rank_one_error(q: Tensor, k: Tensor) -> float:
    """Exact error of the best weighting of rank-1 hard heads, unit q, k (H, 2), for N = 2 points and a query uniform on the circle."""
    if q.shape[1:] != (2,) or q.shape != k.shape:
        raise RegardError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: expected (H, 2)")
    near = 2 / math.pi**2 * (q @ q.T).clamp(-1, 1).asin() * (k @ k.T).clamp(-1, 1).asin()
    angle = (q * k).sum(-1).clamp(-1, 1).acos()
    folded = math.pi / 2 - (math.pi / 2 - angle).abs()
    b = 0.5 + (math.pi / 2 - angle).sign() * (0.25 - (folded / math.pi).square())
    return float(1 - b @ torch.linalg.pinv(0.5 + near) @ b)


@dataclass(frozen=True)
class RankTable(Result):
    """errors: (rank, heads, N, dim) -> normalised error."""

    errors: dict[tuple[int, int, int, int], float]

    def columns(self) -> dict[str, Column]:
        rows = [(*key, value) for key, value in self.errors.items()]
        return {name: [row[at] for row in rows] for at, name in enumerate(("rank", "heads", "points", "dim", "error"))}

    def plot(self) -> Plot:
        """The error by the number of heads, a line for each rank, number of points and dimension."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for (rank, heads, points, dim), error in self.errors.items():
            lines.setdefault(f"rank {rank}, {points} points, {dim} dimensions", []).append((float(heads), error))
        return figure("Ranks against heads", "heads", "error", lines, log_x=True)


def rank_benefit(
    ranks: Sequence[int],
    heads: Sequence[int],
    *,
    points: Sequence[int] = (4,),
    dims: Sequence[int] = (16,),
    samples: int = 20_000,
    seed: int = 0,
) -> RankTable:
    """Errors of random hard heads, weights fitted on half of the samples and measured on the others, and of the full-rank head as
    (dim, 1, N, dim)."""
    found = {}
    for dim in dims:
        for n in points:
            fit, test = (tuple(t for t in nearest_points(samples // 2, dim, n, seed=seed + part)) for part in (0, 1))
            for rank in ranks:
                for count in heads:
                    model = random_heads(dim, rank, count, seed)
                    best_weights(model, *fit)
                    found[rank, count, n, dim] = mse(model, *test)
            found[dim, 1, n, dim] = mse(perfect_head(dim), *test)
    return RankTable(found)
