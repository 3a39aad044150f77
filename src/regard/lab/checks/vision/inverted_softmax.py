"""Checks of inverted-softmax."""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.vision.inverted_softmax import bank_bias, hubness, qb_norm, retrieval_metrics, without_hubs


def by_hand(s: Tensor, bank: Tensor, method: str, beta: float, k: int) -> Tensor:
    out = torch.zeros_like(s)
    active = {int(g) for row in bank for g in sorted(range(bank.shape[1]), key=lambda g: -float(row[g]))[:k]}
    for q in range(s.shape[0]):
        best = max(range(s.shape[1]), key=lambda g: float(s[q, g]))
        for g in range(s.shape[1]):
            others = [float(x) for x in bank[:, g]]
            if method == "gc":
                out[q, g] = -sum(x > float(s[q, g]) for x in others) + s[q, g]
            elif method == "csls":
                out[q, g] = 2 * s[q, g] - sum(sorted(others)[-k:]) / k
            elif method == "is" or best in active:
                out[q, g] = math.exp(beta * float(s[q, g])) / sum(math.exp(beta * x) for x in others)
            else:
                out[q, g] = s[q, g]
    return out


@check(
    "inverted-softmax",
    "dis, is, csls and gc, other beta and k, and their logarithms == loops over queries, items and bank",
    below=1e-12,
    control="softmax over the items",
)
def _() -> tuple[float, float]:
    s, bank, gaps = torch.randn(7, 5, dtype=F64) / 5, torch.randn(3, 5, dtype=F64) / 5, []
    kept = by_hand(s, bank, "dis", 20, 1)
    assert 0 < int((kept == s).all(1).sum()) < 7  # rows of both kinds
    gaps.append(naive.gap(qb_norm(s, bank), kept))
    gaps.append(naive.gap(qb_norm(s, bank, beta=3.0, k=2), by_hand(s, bank, "dis", 3.0, 2)))
    gaps.append(naive.gap(qb_norm(s, bank, "is", beta=7.0), by_hand(s, bank, "is", 7.0, 1)))
    gaps.append(naive.gap(qb_norm(s, bank, "is", logs=True).exp(), by_hand(s, bank, "is", 20, 1)))
    gaps.append(naive.gap(qb_norm(s, bank, "csls", k=2), by_hand(s, bank, "csls", 0, 2)))
    gaps.append(naive.gap(qb_norm(s, bank, "csls"), by_hand(s, bank, "csls", 0, 3)))
    gaps.append(naive.gap(qb_norm(s, bank, "gc"), by_hand(s, bank, "gc", 0, 1)))
    same = qb_norm(s, s, "is")  # over its own queries the columns sum to one
    gaps.append(naive.gap(same.sum(0), torch.ones(5)))
    return max(gaps), naive.gap((20 * s).softmax(1), by_hand(s, bank, "is", 20, 1))


def hubs(seed: int, bank: int = 2000) -> tuple[Tensor, Tensor]:
    """400 items, 8 of them drawn to the mean direction of the queries: similarities (400, 400) and of a bank of other queries."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=F64), dim=-1)

    mean, items = unit(1, 24), unit(400, 24)
    items[:8] = F.normalize(items[:8] + 1.5 * mean, dim=-1)

    def queries(of: Tensor) -> Tensor:
        return F.normalize(items[of] + 0.8 * unit(len(of), 24) + 0.96 * mean, dim=-1)

    own = queries(torch.arange(400))
    return own @ items.T, queries(torch.randint(400, (bank,), generator=generator)) @ items.T


@check("inverted-softmax", "rise of R1 in points by dis, least of three seeds", above=20.0, control="softmax over the items")
def _() -> tuple[float, float]:
    gains = []
    for seed in range(3):
        s, bank = hubs(seed)
        first = retrieval_metrics(s)["R1"]
        gains.append((retrieval_metrics(qb_norm(s, bank))["R1"] - first, retrieval_metrics((20 * s).softmax(1))["R1"] - first))
    return min(a for a, _ in gains), max(b for _, b in gains)


@check(
    "inverted-softmax",
    "skewness of how often items come first, after dis over before, most of three seeds",
    below=0.5,
    control="softmax over the items",
)
def _() -> tuple[float, float]:
    left = []
    for seed in range(3):
        s, bank = hubs(seed)
        left.append((hubness(qb_norm(s, bank)) / hubness(s), hubness((20 * s).softmax(1)) / hubness(s)))
    return max(a for a, _ in left), min(b for _, b in left)


@check(
    "inverted-softmax",
    "metrics and hubness == by places of a full sort, two queries an item, ties at their mean place",
    below=1e-9,
    control="one place off",
)
def _() -> tuple[float, float]:
    s = (torch.randn(12, 6, dtype=F64) * 2).round()
    places = []
    for q in range(12):
        order = sorted(float(x) for x in -s[q])
        at = [i for i, x in enumerate(order) if x == -float(s[q, q // 2])]
        places.append(sum(at) / len(at))

    def metrics(shift: float) -> dict[str, float]:
        r = {f"R{n}": 100 * sum(p + shift < n for p in places) / 12 for n in (5, 10, 50)} | {
            "R1": 100 * sum(p + shift == 0 for p in places) / 12
        }
        mean = sum(places) / 12 + 1 + shift
        return {
            **r,
            "geometric_mean": (r["R1"] * r["R5"] * r["R10"]) ** (1 / 3),
            "MedR": statistics.median(places) + 1 + shift,
            "MeanR": mean,
        }

    found = retrieval_metrics(s)
    counts = torch.zeros(6, dtype=F64)
    for row in s:
        counts[sorted(range(6), key=lambda g: -float(row[g]))[:2]] += 1
    own = [abs(found[key] - value) for key, value in metrics(0).items()]
    distinct = torch.randn(9, 6, dtype=F64)
    n = torch.zeros(6, dtype=F64)
    for row in distinct:
        n[sorted(range(6), key=lambda g: -float(row[g]))[:2]] += 1
    gap = n - n.mean()
    own.append(abs(hubness(distinct, 2) - float((gap**3).mean() / (gap**2).mean() ** 1.5)))
    return max(own), max(abs(found[key] - value) for key, value in metrics(1).items())


@check(
    "inverted-softmax", "attention without hubs == softmax over keys of inverted softmaxes, by loops", below=1e-12, control="plain softmax"
)
def _() -> tuple[float, float]:
    q, k, v, bank = (torch.randn(2, 3, n, 8, dtype=F64) for n in (5, 7, 7, 11))
    out = attend(q, k, v, without_hubs(), position_bias=bank_bias(bank, k))
    scale = 8**-0.5
    logits = scale * torch.einsum("bhid,bhjd->bhij", q, k)
    weights = logits.exp() / (scale * torch.einsum("bhmd,bhjd->bhmj", bank, k)).exp().sum(2, keepdim=True)
    return naive.gap(out, weights / weights.sum(-1, keepdim=True) @ v), naive.gap(
        attend(q, k, v), weights / weights.sum(-1, keepdim=True) @ v
    )
