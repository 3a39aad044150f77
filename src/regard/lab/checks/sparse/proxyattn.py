"""Checks of proxyattn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.algebra.probes import last_mass
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.policies import plan_of
from regard.lab.checks.shared.selected import qkv
from regard.lab.verification import check
from regard.zoo.sparse.proxyattn import block_importance, evaluations, head_shares


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
    more = plan_of("proxyattn", 2 * q, k, gamma=0.8, block_size=16, stride=4, min_blocks=5).keep[0]
    q = 2 * q[0]

    def loop(budget_of: int, least: int = 1) -> Tensor:
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
                wanted = max(least, math.ceil(number / 6 * (u + 1) - 1e-9))
                for w in sorted(range(u + 1), key=lambda w: -float(best[u, w]))[:wanted]:
                    keep[h, u, w] = True
                keep[h, u, 0] = keep[h, u, u] = True
        return keep

    return float((own != loop(0)).sum() + (more != loop(0, 5)).sum()), float((own != loop(1)).sum())


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
