"""Checks of benefits-of-rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.tasks.training import fit
from regard.zoo.analysis.benefits_of_rank import (
    RankedHeads,
    best_weights,
    farthest_points,
    mse,
    nearest_points,
    perfect_head,
    random_heads,
    rank_benefit,
    rank_one_error,
)


@check(
    "benefits-of-rank",
    "d = 16, N = 4: error of one full-rank head, and of the same on N = 64",
    below=2e-3,
    control="one random head of rank 15",
)
def _() -> tuple[float, float]:
    errors = [mse(perfect_head(16), *nearest_points(4000, 16, n, seed=1)) for n in (4, 64)]
    model = random_heads(16, 15, 1)
    best_weights(model, *nearest_points(4000, 16, 4))
    return max(errors), mse(model, *nearest_points(4000, 16, 4, seed=1))


@check(
    "benefits-of-rank",
    "random rank-1 hard heads, 16, 64 and 256, best weights: least error (falling by at most 0.05 from 64 on, rank 8 below)",
    above=0.5,
    control="64 heads of rank 8",
)
def _() -> tuple[float, float]:
    table = rank_benefit([1, 8], [16, 64, 256], samples=5000).errors
    one = [table[1, count, 4, 16] for count in (16, 64, 256)]
    flat = one[1] - one[2] <= 0.05 and table[16, 1, 4, 16] < table[8, 64, 4, 16] < one[2]
    return min(one) if flat else 0.0, table[8, 64, 4, 16]


@check("benefits-of-rank", "d = 2, N = 2, rank 1: closed-form error against 40000 draws", below=0.02, control="the cross term left out")
def _() -> tuple[float, float]:
    gaps, others = [], []
    for heads in (1, 3, 6):
        q, k = (F.normalize(torch.randn(heads, 2, generator=torch.Generator().manual_seed(10 * heads + n)), dim=1) for n in (1, 2))
        model = RankedHeads(2, 1, heads, hard=True)
        with torch.no_grad():
            model.q.copy_(q[:, None])
            model.k.copy_(k[:, None])
        draws = [nearest_points(40_000, 2, 2, seed=seed) for seed in (1, 2)]
        best_weights(model, *draws[0])
        error = mse(model, *draws[1])
        gaps.append(abs(error - rank_one_error(q.double(), k.double())))
        angle = (q * k).sum(-1).acos()
        b = 0.75 - angle / torch.pi / 2
        others.append(abs(error - float(1 - b @ torch.linalg.pinv(torch.full((heads, heads), 0.5)) @ b)))
    return max(gaps), max(others)


@check(
    "benefits-of-rank",
    "soft and hard heads, targets of the three geometries and of the self variant: loops",
    below=1e-12,
    control="scores without 1 / sqrt(r)",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for hard, geometry in ((False, "uniform"), (True, "orthonormal"), (False, "doubled")):
        model = RankedHeads(5, 3, 2, hard).to(F64)
        x, y, target = nearest_points(3, 5, 4, 2, geometry, dtype=F64)
        truth, unscaled, near, far = (torch.zeros(3, 5, m, dtype=F64) for m in (2, 2, 2, 4))
        for b in range(3):
            for q in range(2):
                best = max(range(4), key=lambda n: float(x[b, :, n] @ y[b, :, q]))
                near[b, :, q] = x[b, :, best]
                for h in range(2):
                    s = torch.stack([(model.q[h] @ y[b, :, q]) @ (model.k[h] @ x[b, :, n]) for n in range(4)]).detach()
                    for into, scale in ((truth, 3**-0.5), (unscaled, 1.0)):
                        p = torch.eye(4, dtype=F64)[int(s.argmax())] if hard else (s * scale).softmax(0)
                        into[b, :, q] += model.vo[h].detach() @ (x[b] @ p)
            for n in range(4):
                far[b, :, n] = x[b, :, min(range(4), key=lambda m: float(x[b, :, m] @ x[b, :, n]))]
        gaps += [naive.gap(model(x, y), truth), naive.gap(target, near)]
        gaps += [] if geometry == "orthonormal" else [naive.gap(farthest_points(x), far)]  # there all others are as far
        gaps.append(float((x.norm(dim=1) - 1).abs().max()))
        others += [] if hard else [naive.gap(model(x, y), unscaled)]
    start = RankedHeads(6, 2, 3)
    bounds = [(start.q, (6 / 8) ** 0.5), (start.k, (6 / 8) ** 0.5), (start.vo, (6 / 24) ** 0.5)]
    within = all(0.8 * most < float(p.detach().abs().max()) <= most for p, most in bounds)
    return max(gaps) if within else 1.0, min(others)


@check("benefits-of-rank", "trained 500 steps, d = 8, N = 4, four heads of full rank: error", below=0.25, control="eight heads of rank 1")
def _() -> tuple[float, float]:
    def trained(rank: int, heads: int) -> float:
        torch.manual_seed(0)
        model = RankedHeads(8, rank, heads)

        def loss(generator_seed: int) -> torch.Tensor:
            x, y, target = nearest_points(256, 8, 4, 2, seed=generator_seed)
            return (model(x, y) - target).square().sum(1).mean()

        fit(model, lambda g: int(torch.randint(10**6, (1,), generator=g)), loss, 500, lr=1e-2)
        return mse(model, *nearest_points(2000, 8, 4, seed=10**7))

    return trained(8, 4), trained(1, 8)
