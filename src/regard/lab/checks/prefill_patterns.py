"""Checks of policies that learn a prompt's pattern from a few queries: FlexPrefill, ProxyAttn."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ...algebra import Causal
from ...algebra.blocks import pooled
from ...algebra.probes import probed
from ...catalog import get
from ...engine import attend
from ...mechanisms.selected.flexprefill import distance, last_mass
from ...mechanisms.selected.proxy import block_importance, evaluations, head_shares
from .. import naive
from ..verification import check
from .policies import plan_of
from .selected import qkv

F64 = torch.float64


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
    d = distance(q / 4, pooled(k, 16), mass, 16)[0]
    strong = mass[0, 10:].topk(5, -1).indices // 16
    keep = plan_of("flexprefill", q, k, min_budget=16, block_size=16, count_size=16).keep[0, 10:, -1]
    read = keep.gather(-1, strong).all()

    def right(tau: float) -> float:
        return float(((d < tau) == (torch.arange(20) < 10)).sum()) * float(read)

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


@check("proxyattn", "identical heads: every grouping gives the same map; gamma = 1 is dense", below=1e-10, control="heads that differ")
def _() -> tuple[float, float]:
    q, k, v = qkv(203, heads=4)
    same_q, same_k = (x[:, :1].expand(-1, 4, -1, -1) for x in (q, k))

    def differ(q: Tensor, k: Tensor) -> float:
        maps = [plan_of("proxyattn", q, k, groups=g, block_size=16, stride=2).keep for g in (1, 2, 4)]
        return float(sum(int((one != maps[2]).sum()) for one in maps))

    dense = naive.gap(attend(q, k, v, get("proxyattn", gamma=1.0)), attend(q, k, v, mask=Causal()))
    return differ(same_q, same_k) + dense, differ(q, k)


@check(
    "proxyattn",
    "heads of sharpness 0.5 ... 8: the least mass a head's own budget captures at gamma 0.9",
    above=0.9,
    control="one budget, the mean, for all",
)
def _() -> tuple[float, float]:
    base = torch.randn(1, 1, 1, 16, dtype=F64)
    keys = 0.5 * torch.randn(1, 1, 16, 1, 16, dtype=F64).expand(-1, -1, -1, 16, -1).flatten(2, 3)
    factor = torch.tensor([0.5, 1, 2, 4, 6, 8], dtype=F64)[:, None, None]
    q, k = factor * base.expand(1, 6, 256, 16), keys.expand(1, 6, 256, 16)
    mass = last_mass(q / 4, k, 16)[0].unflatten(-1, (16, 16)).sum(-1)[0]
    keep = plan_of("proxyattn", q, k, groups=1, gamma=0.9, block_size=16, stride=4).keep[0, :, -1]
    uniform = round(float(keep.sum(-1).double().mean()))
    order = block_importance(q / 4, k, 1, 16, 4)[0, 0, -1].argsort(descending=True)[:uniform]
    flatter = bool(keep[0].sum() > keep[-1].sum())
    return float((mass * keep).sum(-1).amin()) if flatter else 0.0, float(mass[:, order].sum(-1).amin())


@check("proxyattn", "the map equals a loop, ragged length and grouped heads: blocks that differ", below=0, control="another head's budget")
def _() -> tuple[float, float]:
    q, k, _ = qkv(89, heads=4, kv=2)
    own = plan_of("proxyattn", 2 * q, k, gamma=0.8, block_size=16, stride=4).keep[0]
    q = 2 * q[0]

    def loop(budget_of: int) -> Tensor:
        keep = torch.zeros(4, 6, 6, dtype=torch.bool)
        for h in range(4):
            c = h // 2
            mean_q = q[2 * c : 2 * c + 2].mean(0)
            best = torch.zeros(6, 6, dtype=F64)
            for i in range(0, 89, 4):
                row = torch.tensor([float(mean_q[i] @ k[0, c, j]) / math.sqrt(8) for j in range(0, i + 1, 4)], dtype=F64).softmax(0)
                for j, p in zip(range(0, i + 1, 4), row, strict=True):
                    best[i // 16, j // 16] = max(best[i // 16, j // 16], p)
            g = (h + budget_of) % 4
            rows = [(k[0, g // 2, : i + 1] @ q[g, i] / math.sqrt(8)).softmax(0) for i in range(73, 89)]
            mass = sorted((sum(float(row[w * 16 : (w + 1) * 16].sum()) for row in rows) / 16 for w in range(6)), reverse=True)
            number = next(m for m in range(1, 7) if sum(mass[:m]) >= 0.8 - 1e-9)
            for u in range(6):
                wanted = max(1, math.ceil(number / 6 * (u + 1) - 1e-9))
                for w in sorted(range(u + 1), key=lambda w: -float(best[u, w]))[:wanted]:
                    keep[h, u, w] = True
                keep[h, u, 0] = keep[h, u, u] = True
        return keep

    return float((own != loop(0)).sum()), float((own != loop(1)).sum())


@check(
    "proxyattn",
    "token pairs scored: 8 heads, L = 512, 2 proxies, block 32, stride 4, counted from the tensors",
    below=0,
    control="every head sampled",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(512, heads=8)
    sampled = block_importance(q, k, 2, 4, 4)  # blocks of one sample: the map's own size is what was scored
    shares = head_shares(q, k, 0.9, 32)
    counted = 2 * sampled.shape[-1] ** 2 + shares.numel() * 32 * 512
    return float(abs(evaluations(8, 512, 2, 32, 4) - counted)), float(abs(evaluations(8, 512, 8, 32, 4) - counted))
