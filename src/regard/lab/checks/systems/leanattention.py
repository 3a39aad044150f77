"""Checks of leanattention."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.systems.leanattention import Partial, identity, lean_decode, merge, schedule

LENGTHS = [500, 1, 137]


def given(n: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged keys; what stands behind a sequence's end must never be read."""
    q, k, v = (scale * torch.randn(3, 4, n, 16, dtype=F64), *(torch.randn(3, 2, 500, 16, dtype=F64) for _ in range(2)))
    for row, size in enumerate(LENGTHS):
        k[row, :, size:] = v[row, :, size:] = float("nan")
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
    n = q.shape[2]
    out, lse = torch.zeros(3, 4, n, 16, dtype=F64), torch.full((3, 4, n), -torch.inf, dtype=F64)
    for row, head, i in itertools.product(range(3), range(4), range(n)):
        end = LENGTHS[row] - n + 1 + i if causal else LENGTHS[row]
        if end > 0:
            s = torch.stack([(q[row, head, i] * k[row, head // 2, j]).sum() / 4 for j in range(end)])
            lse[row, head, i] = s.logsumexp(0)
            out[row, head, i] = (s - lse[row, head, i]).exp() @ v[row, head // 2, :end]
    return out, lse


@check(
    "leanattention",
    "ragged sequences, 1 and 3 queries, scores of tens of thousands, 1, 3, 7, N and 2N workers: gap of outputs and log-sum-exps",
    below=1e-9,
    control="workers' shares of a head not merged: the first alone",
)
def _() -> tuple[float, float]:
    own, other = 0.0, math.inf
    for n, scale, causal in ((1, 1.0, True), (1, 200.0, True), (3, 200.0, False), (3, 1.0, True)):
        q, k, v = given(n, scale)
        out, lse = by_hand(q, k, v, causal)
        total = schedule(LENGTHS, 2, 16).total
        for workers in (1, 3, 7, total, 2 * total):
            found, sums = lean_decode(q, k, v, LENGTHS, tile=16, workers=workers, causal=causal)
            real = lse.isfinite()
            assert torch.equal(sums.isfinite(), real)
            own = max(
                own, naive.gap(found, out), naive.gap(sums[real] / lse[real].abs().clamp_min(1), (lse / lse.abs().clamp_min(1))[real])
            )
        first = [math.ceil(math.ceil(size / 16) / 7) * 16 for size in LENGTHS]
        short = lean_decode(q, k, v, [min(a, b) for a, b in zip(first, LENGTHS, strict=True)], tile=16, causal=False)[0]
        other = min(other, naive.gap(short, out))
    return own, other


@check(
    "leanattention",
    "300 ragged batches: the most a worker has beyond the least, where the shares tile all N exactly",
    below=1.0,
    control="a worker a head, as FlashAttention-2 has it",
)
def _() -> tuple[float, float]:
    worst, heads = 0, 0
    for _ in range(300):
        lengths = torch.randint(0, 500, (3,)).tolist()
        plan = schedule(lengths, 2, 16, int(torch.randint(1, 60, ())))
        done = [0] * plan.workers
        tiles = []
        for span in plan.spans:
            done[span.worker] += span.stop - span.first
            tiles += [(span.head, t) for t in range(span.first, span.stop)]
        assert tiles == [(head, t) for head, count in enumerate(plan.tiles) for t in range(count)]
        assert plan.tiles == tuple(math.ceil(n / 16) for n in lengths for _ in range(2))
        worst, heads = max(worst, max(done) - min(done)), max(heads, max(plan.tiles) - min(plan.tiles))
    return float(worst), float(heads)


@check("leanattention", "merging is associative, commutative and has an identity: gap", below=1e-12, control="numerators added as they are")
def _() -> tuple[float, float]:
    def draw() -> Partial:
        return 300 * torch.randn(5, 1, dtype=F64), torch.rand(5, 1, dtype=F64) + 0.5, torch.randn(5, 8, dtype=F64)

    def apart(x: Partial, y: Partial) -> float:
        return max(naive.gap(a, b) for a, b in zip(x, y, strict=True))

    x, y, z = draw(), draw(), draw()
    none = identity((5,), 8, x[0])
    own = max(
        apart(merge(merge(x, y), z), merge(x, merge(y, z))),
        apart(merge(x, y), merge(y, x)),
        apart(merge(none, x), x),
        apart(merge(x, none), x),
    )
    assert all(torch.equal(a, b) for a, b in zip(merge(none, none), none, strict=True))
    return own, naive.gap(merge(x, y)[2], x[2] + y[2])


@check(
    "leanattention",
    "results that go through scratch memory: worker-head pairs whose worker has not the head's first tile, counted tile by tile: difference",
    below=0.0,
    control="every pair",
)
def _() -> tuple[float, float]:
    own = every = 0
    for workers in (1, 3, 7, 40):
        plan = schedule(LENGTHS, 2, 16, workers)
        heads = [(head, t) for head, count in enumerate(plan.tiles) for t in range(count)]
        pairs = set()
        for worker in range(workers):
            for at in range(math.floor(worker * len(heads) / workers), math.floor((worker + 1) * len(heads) / workers)):
                pairs.add((worker, heads[at][0]))
        hosts = {head: min(w for w, h in pairs if h == head) for head in range(6)}
        peers = sum(hosts[head] != worker for worker, head in pairs)
        own, every = own + abs(plan.partials - peers), every + abs(len(pairs) - peers)
    return float(own), float(every)
