"""Checks of mha-memorization-capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.analysis.mha_memorization_capacity import MemoryAttention, bound, examples, kruskal_rank, memorise, saturation

SIZES = ((3, 6, 10), (4, 5, 12))


def layer(heads: int, dim: int, weights: str = "softmax", key_dim: int | None = None) -> MemoryAttention:
    torch.manual_seed(0)
    model = MemoryAttention(dim, heads, weights=weights, key_dim=key_dim).to(F64)
    model.q.data.mul_(3 * dim**0.5)
    return model


def rank(model: MemoryAttention, n: int, dim: int, contexts: str) -> int:
    queries, kept = examples(200, n, dim, contexts, dtype=F64)
    return int(torch.linalg.matrix_rank(model.features(queries - 0.5, kept).detach(), rtol=1e-9))


@check(
    "mha-memorization-capacity",
    "the layer, softmax and sigmoid, by loops over heads and tokens",
    below=1e-12,
    control="scores without d^-1/2",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for kind in ("softmax", "sigmoid"):
        model = MemoryAttention(6, 3, key_dim=4, value_dim=2, outputs=5, weights=kind).to(F64)
        queries, kept = examples(4, 7, 6, "permuted", bag=9, dtype=F64)
        both = []
        for scale in (6**-0.5, 1.0):
            truth = torch.zeros(4, 5, dtype=F64)
            for b in range(4):
                reads = []
                for h in range(3):
                    s = torch.stack([(model.q[h] @ queries[b]) @ (model.k[h] @ kept[b, i]) for i in range(7)]) * scale
                    a = s.exp() / s.exp().sum() if kind == "softmax" else 1 / (1 + (-s).exp())
                    reads.append(sum(a[i] * (model.v[h] @ kept[b, i]) for i in range(7)))
                truth[b] = model.out.weight @ torch.cat(reads)  # type: ignore[arg-type]
            both.append(naive.gap(model(queries, kept), truth))
        gaps.append(both[0])
        others.append(both[1])
    return max(gaps), min(others)


@check(
    "mha-memorization-capacity",
    "rank of 200 queries' features less H (n - 1) + 1 (shared context) and less min(T, H d) (contexts of their own)",
    below=0,
    control="sigmoid weights",
)
def _() -> tuple[float, float]:
    own, sigmoid = 0, 0
    for heads, n, dim in SIZES:
        own += abs(rank(layer(heads, dim), n, dim, "shared") - (heads * (n - 1) + 1))
        own += abs(rank(layer(heads, dim), n, dim, "random") - min(200, heads * dim))
        sigmoid += abs(rank(layer(heads, dim, "sigmoid"), n, dim, "shared") - (heads * (n - 1) + 1))
    same = layer(3, 10)
    same.q.data[1:], same.k.data[1:] = same.q.data[:1], same.k.data[:1]
    own += int(rank(same, 6, 10, "shared") != 6) + int(rank(layer(3, 10, key_dim=3), 6, 10, "shared") > 16)
    return own, sigmoid


@check(
    "mha-memorization-capacity",
    "closed form, shared context, random labels of H (n - 1) + 1 queries: largest residual",
    below=1e-7,
    control="three queries more",
)
def _() -> tuple[float, float]:
    def residual(more: int) -> list[float]:
        found = []
        for heads, n, dim in SIZES:
            count = bound(heads, n, dim) + more
            queries, kept = examples(count, n, dim, "shared", seed=2, dtype=F64)
            y = torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=F64)
            found.append(layer(heads, dim).solve(queries - 0.5, kept, y))
        return found

    return max(residual(0)), min(residual(3))


@check(
    "mha-memorization-capacity",
    "training: of 120 examples with 10 labels, those right after 400 steps, 8 heads",
    above=110.0,
    control="1 head",
)
def _() -> tuple[float, float]:
    queries, kept = examples(120, 8, 16, "random")
    labels = torch.randint(10, (120,), generator=torch.Generator().manual_seed(1))
    runs = [memorise(queries, kept, labels, heads=heads, classes=10, steps=400, lr=1e-2) for heads in (8, 1)]
    return float(runs[0].count), float(runs[1].count)


@check(
    "mha-memorization-capacity", "Kruskal ranks and saturation of planted data: wrong ones", below=0, control="of rows in general position"
)
def _() -> tuple[float, float]:
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    tied: Tensor = rows.clone()
    tied[6] = tied[2] - 2 * tied[4]
    model = layer(2, 4)
    with torch.no_grad():
        model.q[0].mul_(1e3)
        model.q[1].zero_()
    queries, kept = examples(50, 3, 4, "random", dtype=F64)
    full = saturation(model, queries, kept)
    wrong = int(kruskal_rank(tied) != 2) + int(kruskal_rank(rows) != 5) + int(float(full[0]) < 0.9) + int(float(full[1]) != 0)
    return wrong + int(bound(3, 6, 4) != 10) + int(bound(3, 4, 6) != 10), int(kruskal_rank(rows) != 2)
