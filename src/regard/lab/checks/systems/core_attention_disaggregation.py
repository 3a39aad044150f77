"""Checks of core-attention-disaggregation."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.verification import check
from regard.zoo.systems.core_attention_disaggregation import AttentionPlan, Task, core_attention_tasks, head_parallel_bytes, plan_attention


def mix(scale: float, ranks: int = 4) -> list[list[int]]:
    """Lognormal documents, filled up to as many tokens a rank."""
    room, found = int(64 * scale), []
    for _ in range(ranks):
        own: list[int] = []
        while sum(own) < room:
            own.append(min(room - sum(own), 1 + int(scale * float(torch.randn(()).mul(1.2).exp()) * 8)))
        found.append(own)
    return found


def colocated(documents: list[list[int]]) -> AttentionPlan:
    return plan_attention(documents, tol=1e9, tile=1)


@check(
    "core-attention-disaggregation",
    "6 mixes of documents, tiles of 4: outputs and gradients equal loops document by document",
    below=1e-10,
    control="documents not told apart",
)
def _() -> tuple[float, float]:
    own, other = 0.0, []
    for _ in range(6):
        documents = mix(0.6)
        plan = plan_attention(documents, tol=0.05, tile=4)
        lengths, length = plan.documents, sum(plan.documents)
        q, k, v = (torch.randn(1, h, length, 4, dtype=F64, requires_grad=True) for h in (4, 2, 2))
        which = [at for at, n in enumerate(lengths) for _ in range(n)]
        truth = naive.attention(q, k, v, naive.softmax, lambda i, j, which=which: j <= i and which[i] == which[j])
        found = core_attention_tasks(q, k, v, plan)
        assert len(plan.tasks) > len(lengths)
        own = max(own, gap_with_gradients(found, truth, (q, k, v)))
        one = AttentionPlan((length,), 1, (Task(0, 0, length, 0, 0),), 2, 2)
        other.append(naive.gap(core_attention_tasks(q, k, v, one), truth))
    return own, min(other)


@check(
    "core-attention-disaggregation",
    "50 plans: pairs of a query and a key not covered exactly once, and work beside its count",
    below=0.0,
    control="tasks that read their own rows' keys alone",
)
def _() -> tuple[float, float]:
    own = other = 0
    for _ in range(50):
        plan = plan_attention(mix(1.0), tol=0.1, tile=8)
        for at, n in enumerate(plan.documents):
            seen, short = torch.zeros(n, n, dtype=torch.long), torch.zeros(n, n, dtype=torch.long)
            for task in (one for one in plan.tasks if one.document == at):
                pairs = torch.ones(n, n, dtype=torch.long).tril()[task.start : task.stop]
                own += int(pairs.sum()) != task.work
                seen[task.start : task.stop] += pairs
                short[task.start : task.stop, task.start :] += pairs[:, task.start :]
            own += int((seen != torch.ones(n, n, dtype=torch.long).tril()).sum())
            other += int((short != torch.ones(n, n, dtype=torch.long).tril()).sum())
    return float(own), float(other)


@check(
    "core-attention-disaggregation",
    "50 mixes that are uneven where they stand (1.5 and more): largest load over the mean, less what a tile weighs",
    below=1.1,
    control="whole documents where they stand",
)
def _() -> tuple[float, float]:
    worst, least, found = 0.0, 9.0, 0
    while found < 50:
        documents = mix(30.0)
        before = colocated(documents).loads()
        mean = sum(before) / 4
        if max(before) / mean < 1.5:
            continue
        found += 1
        loads = plan_attention(documents, tol=0.1, tile=32).loads()
        assert sum(loads) == sum(before)
        slack = 32 * max(n for rank in documents for n in rank) / mean
        worst, least = max(worst, max(loads) / mean - slack), min(least, max(before) / mean - slack)
    return worst, least


@check(
    "core-attention-disaggregation",
    "share of 40 mixes in which fewer bytes move than by context parallelism over heads, keys a quarter of queries",
    above=0.8,
    control="every task a rank further",
)
def _() -> tuple[float, float]:
    wins = [0, 0]
    for _ in range(40):
        documents = mix(30.0)
        plan = plan_attention(documents, tol=0.1, tile=32, q_bytes=8, kv_bytes=4)
        away = AttentionPlan(
            plan.documents, 4, tuple(Task(t.document, t.start, t.stop, t.owner, (t.owner + 1) % 4) for t in plan.tasks), 8, 4
        )
        limit = head_parallel_bytes(documents, 8, 4)
        wins[0] += plan.moved() <= limit
        wins[1] += away.moved() <= limit
    return wins[0] / 40, wins[1] / 40


@check("core-attention-disaggregation", "bytes and time of a plan by hand: gap", below=1e-12, control="traffic of keys alone")
def _() -> tuple[float, float]:
    plan = AttentionPlan((10, 6), 2, (Task(0, 0, 7, 0, 0), Task(0, 7, 10, 0, 1), Task(1, 0, 6, 1, 1)), 3, 5)
    work = [28, 8 + 9 + 10 + 21]
    moved = 3 * 2 * 3 + 10 * 5
    gaps = [abs(a - b) for a, b in zip(plan.loads(), work, strict=True)]
    times: list[Tensor | float] = [abs(plan.seconds(4.0, 1e9) - 12.0), abs(plan.seconds(1e9, 2.0) - moved / 2)]
    return float(max(*gaps, abs(plan.moved() - moved), *times)), float(abs(plan.moved() - 50))
