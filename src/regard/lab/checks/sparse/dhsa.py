"""Checks of dhsa."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.dhsa import BoundaryPredictor, boundary_loss, choose_boundaries, chunk_keys, mass_ratio, selected_tokens


@check(
    "dhsa",
    "chunks of 4 to 256 iid keys: largest over smallest deviation of the scores, less 1",
    below=0.1,
    control="plain means",
)
def _() -> tuple[float, float]:
    q, found = torch.randn(16, dtype=F64), []
    for size in (4, 16, 64, 256):
        k = torch.randn(1, 1, 2000 * size, 16, dtype=F64)
        s = chunk_keys(k, torch.arange(2000).repeat_interleave(size)[None])[0] @ q
        found.append((float(s.std()), float((s / math.sqrt(size)).std())))
    return tuple(max(x) / min(x) - 1 for x in zip(*found, strict=True))  # type: ignore[return-value]


def tokens_loop(q: Tensor, k: Tensor, starts: list[int], budget: int, block: int, local: int) -> Tensor:
    """(blocks, L) bool for one batch entry, tokens one after another."""
    length, edges = k.shape[1], [*starts, k.shape[1]]
    mean_q, mean_k = q.mean(0), k.mean(0)
    keep = torch.zeros(-(-length // block), length, dtype=torch.bool)
    for u in range(len(keep)):
        rows = mean_q[u * block : (u + 1) * block]
        query = rows.sum(0) / math.sqrt(len(rows))
        end = min((u + 1) * block, length)
        s = torch.zeros(length, dtype=F64)
        for first, last in pairwise(edges):
            score = query @ (mean_k[first:last].sum(0) / math.sqrt(last - first))
            for j in range(first, last):
                s[j] = score
        chosen = list(range(max(0, end - min(local, budget)), end))
        rest = sorted((j for j in range(end) if j not in chosen), key=lambda j: (-float(s[j]), j))
        keep[u, chosen + rest[: budget - len(chosen)]] = True
    return keep


@check(
    "dhsa",
    "ragged borders, 512 tokens: chosen tokens equal loops (differing tokens), and a budget of all is dense attention",
    below=1e-10,
    control="borders one token late",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 512, 16, dtype=F64) for _ in range(3))
    borders = [0, *sorted(random.Random(0).sample(range(1, 512), 30))]
    starts = torch.zeros(1, 512, dtype=F64)
    starts[0, borders] = 1
    late = starts.roll(1, 1)
    truth = tokens_loop(q[0], k[0], borders, 128, 32, 64)
    wrong = []
    for given in (starts, late):
        keep = selected_tokens(q, k, 0, given, 128, 32, 64, 0, 16, "cosine")
        assert keep is not None
        wrong.append(float((keep[0] != truth).sum()))
    dense = naive.gap(attend(q, k, v, get("dhsa", budget=512), starts=starts), attend(q, k, v, mask=Causal()))
    sparse = attend(q, k, v, get("dhsa", budget=128), starts=starts)
    seen = truth.repeat_interleave(32, 0) & torch.ones(512, 512, dtype=torch.bool).tril()
    return wrong[0] + dense + naive.gap(sparse, attend(q, k, v, mask=seen)), wrong[1]


@check("dhsa", "the mass ratio of every gap equals loops over rows and keys", below=1e-9, control="rows counted from the gap on")
def _() -> tuple[float, float]:
    p = torch.randn(1, 2, 40, 40, dtype=F64).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    a, truth = p[0].mean(0), [[], []]  # type: ignore[var-annotated]
    for n, late in enumerate((4, 1)):
        for t in range(40):
            past = sum(float(a[i, j]) for i in range(t + late, 40) for j in range(max(0, t - 3), t + 1))
            future = sum(float(a[i, j]) for i in range(t + late, 40) for j in range(t + 1, min(40, t + 5)))
            truth[n].append((max(past, future) + 1e-6) / (min(past, future) + 1e-6))
    found = mass_ratio(p)[0]
    scale = torch.tensor(truth, dtype=F64)
    return tuple(float(((found - x) / x).abs().max()) for x in scale)  # type: ignore[return-value]


@check(
    "dhsa",
    "a predictor trained on 16 planted texts finds borders of 8 new ones within two tokens: share found",
    above=0.8,
    control="the untrained predictor",
)
def _() -> tuple[float, float]:
    draw, topics = random.Random(0), torch.randn(6, 16)

    def text() -> tuple[Tensor, Tensor, list[int]]:
        borders, at = [], 0
        while (at := at + draw.randint(12, 24)) < 128:
            borders.append(at)
        segment = torch.zeros(128, dtype=torch.long)
        segment[borders] = 1
        segment = segment.cumsum(0)
        order = torch.tensor([n % 6 for n in range(len(borders) + 1)]) + draw.randint(0, 5)
        keys = topics[order[segment] % 6] + 0.3 * torch.randn(128, 16)
        same = (segment[:, None] == segment).float().tril()
        late = same + 0.02 * torch.ones(128, 128).tril()
        return keys[None], mass_ratio((late / late.sum(-1, keepdim=True))[None, None])[0], borders

    train, test = [text() for _ in range(16)], [text() for _ in range(8)]
    predictor = BoundaryPredictor(16, hidden=32)

    def found() -> float:
        share = []
        for keys, _, borders in test:
            starts = choose_boundaries(predictor(keys), -math.inf, len(borders))[0].nonzero().flatten().tolist()
            share += [any(abs(at - other) <= 2 for other in starts) for at in borders]
        return sum(share) / len(share)

    before = found()
    optimizer = torch.optim.Adam(predictor.parameters(), 3e-3)
    keys, ratios = torch.cat([x[0] for x in train]), torch.stack([x[1] for x in train])
    for _ in range(150):
        optimizer.zero_grad()
        boundary_loss(predictor(keys), ratios).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found(), before
