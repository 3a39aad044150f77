"""Checks of flexprefill."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.algebra.probes import last_mass, probed
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.policies import plan_of
from regard.lab.checks.shared.selected import qkv
from regard.lab.verification import check
from regard.zoo.sparse.flexprefill import patterns


@check("flexprefill", "gamma > 1 is dense causal attention", below=1e-10, control="gamma = 0.5")
def _() -> tuple[float, float]:
    q, k, v = qkv(300)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("flexprefill", gamma=gamma, block_size=16, min_budget=16)) for gamma in (1.1, 0.5)]
    return naive.gap(outs[0], truth), naive.gap(outs[1], truth)


def flex_loop(q: Tensor, k: Tensor, b: int, gamma: float, tau: float, low: int, per_row: bool = False) -> tuple[bool, Tensor]:
    """FlexPrefill of one head in plain Python: (query-aware, active blocks)."""
    n, d = q.shape
    count = n // b
    p = [[float(x) for x in (k[: i + 1] @ q[i] / math.sqrt(d)).softmax(0)] + [0.0] * (n - 1 - i) for i in range(n - b, n)]
    column = [sum(row[j] for row in p) / b for j in range(n)]
    slash = [0.0] * n
    for row, i in zip(p, range(n - b, n), strict=True):
        for j in range(i + 1):
            slash[i - j] += row[j] / b
    means_q, means_k = q.unflatten(0, (count, b)).mean(1), k.unflatten(0, (count, b)).mean(1)
    a_hat = (means_k @ means_q[-1] / math.sqrt(d)).softmax(0).tolist()
    a_bar = [sum(column[w * b : (w + 1) * b]) for w in range(count)]
    jsd = 0.0
    for x, y in zip(a_hat, a_bar, strict=True):
        m = (x + y) / 2
        jsd += 0.5 * (x * math.log(x / m) + (y * math.log(y / m) if y else 0.0))
    aware = math.sqrt(max(jsd, 0)) < tau
    sets = []
    for mass in (column, slash):
        total, number = 0.0, 1
        for x in sorted(mass, reverse=True):
            total += x
            number += total <= gamma
        budget = low // b if aware else min(max(number // b + 1, low // b), count)
        pools = [sum(mass[w * b : (w + 1) * b]) for w in range(count)]
        pools[0] = math.inf
        sets.append(set(sorted(range(count), key=lambda w: -pools[w])[:budget]))
    keep = torch.zeros(count, count, dtype=torch.bool)
    for u in range(count):
        for w in range(u + 1):
            keep[u, w] = w in sets[0] or (u - w) in sets[1]
    if aware:
        pool = [(means_k[: u + 1] @ means_q[u] / math.sqrt(d)).softmax(0).tolist() for u in range(count)]
        for group in (
            [[(u, w) for w in range(u + 1)] for u in range(count)] if per_row else [[(u, w) for u in range(count) for w in range(u + 1)]]
        ):
            total = 0.0
            for u, w in sorted(group, key=lambda at: -pool[at[0]][at[1]]):
                total += pool[u][w]
                if total <= gamma * (1 if per_row else count):
                    keep[u, w] = True
    return aware, keep


def flex_heads() -> tuple[Tensor, Tensor]:
    """20 heads, half of them smooth (query-aware), half with strong single keys."""
    q, k = 0.5 * torch.randn(1, 20, 256, 16, dtype=F64), 0.5 * torch.randn(1, 20, 256, 16, dtype=F64)
    k[:, :10] = torch.randn(1, 10, 16, 1, 16, dtype=F64).expand(-1, -1, -1, 16, -1).flatten(2, 3)
    q[:, :10] = torch.randn(1, 10, 1, 16, dtype=F64) + 0.05 * q[:, :10]
    direction = torch.nn.functional.normalize(torch.randn(16, dtype=F64), dim=0)
    q[:, 10:] += 4 * direction
    for h in range(10, 20):
        k[0, h, torch.randperm(240)[:5]] += 5 * direction
    return q, k


@check(
    "flexprefill",
    "patterns, budgets and the flattened choice equal plain Python on 20 heads: blocks that differ",
    below=0,
    control="a threshold a row",
)
def _() -> tuple[float, float]:
    q, k = flex_heads()
    keep = plan_of("flexprefill", q, k, gamma=0.85, tau=0.1, min_budget=16, block_size=16, count_size=16).keep[0]
    loops = [flex_loop(q[0, h], k[0, h], 16, 0.85, 0.1, 16) for h in range(20)]
    rows = [flex_loop(q[0, h], k[0, h], 16, 0.85, 0.1, 16, True)[1] for h in range(20)]
    mixed = 0 < sum(aware for aware, _ in loops) < 20
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    wrong = float(sum(int(((keep[h] != loops[h][1]) & causal).sum()) for h in range(20)))
    return wrong if mixed else math.inf, float(sum(int(((keep[h] != rows[h]) & causal).sum()) for h in range(20)))


@check(
    "flexprefill",
    "planted heads: smooth ones lie under tau, heads with strong keys above, whose blocks are read: heads decided right",
    above=20,
    control="tau = 2",
)
def _() -> tuple[float, float]:
    q, k = flex_heads()
    mass, _ = last_mass(q / 4, k, 16)
    strong = mass[0, 10:].topk(5, -1).indices // 16
    keep = plan_of("flexprefill", q, k, min_budget=16, block_size=16, count_size=16).keep[0, 10:, -1]
    read = keep.gather(-1, strong).all()

    def right(tau: float) -> float:
        names = patterns(q, k, tau=tau, block_size=16)[0]
        told = ["query-aware" if flex_loop(q[0, h], k[0, h], 16, 0.85, tau, 16)[0] else "vertical-slash" for h in range(20)]
        return float(sum((name == "query-aware") == (h < 10) for h, name in enumerate(names))) * float(read) * (names == told)

    return right(0.1), right(2.0)


@check(
    "flexprefill",
    "density grows with gamma 0.5, 0.8, 0.9, 0.99 and no block lies in the future: falls",
    below=0,
    control="gammas the other way round",
)
def _() -> tuple[float, float]:
    q, k = flex_heads()
    maps = [plan_of("flexprefill", q, k, gamma=gamma, min_budget=16, block_size=16, count_size=16) for gamma in (0.5, 0.8, 0.9, 0.99)]
    future = sum(int((one.keep & ~torch.ones(16, 16, dtype=torch.bool).tril()).sum()) for one in maps)
    falls = [sum(b.density < a.density for a, b in pairwise(order)) for order in (maps, maps[::-1])]
    return float(falls[0] + future), float(falls[1])


@check("flexprefill", "sums over columns and diagonals equal a loop", below=1e-12, control="one in place of the other")
def _() -> tuple[float, float]:
    q, k, _ = qkv(60)
    columns, slashes = probed(q[:, :, 20:], k, torch.arange(20, 60), diagonals=True)
    truth = torch.zeros(2, 1, 2, 60, dtype=F64)
    for i in range(20, 60):
        p = (q[:, :, i : i + 1] @ k[:, :, : i + 1].transpose(-1, -2)).softmax(-1)[..., 0, :]
        for j in range(i + 1):
            truth[0, ..., j] += p[..., j]
            truth[1, ..., i - j] += p[..., j]
    return naive.gap(torch.stack([columns, slashes]), truth), naive.gap(torch.stack([slashes, columns]), truth)
