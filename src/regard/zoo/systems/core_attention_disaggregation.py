"""Core attention disaggregation: documents' attention cut into tasks that are dealt evenly to servers (id 211; Zhuang et al., 2025).

task: rows [a, b) of a document over its keys [0, b); work F = q kv - q (q - 1) / 2, q = b - a, kv = b
balance: servers by deficit; each takes, from servers with a surplus, what moves the fewest bytes for its work, cut so that both fit
out, lse of every task; gradients of keys and values are sums over the tasks that read them, at their owner
Not built: transport and ping-pong overlap over a network of trainers, and one fused call a server; servers are virtual, in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.algebra import Causal, Weighted
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError


@dataclass(frozen=True)
class Task:
    """Rows start <= i < stop of document `document`, whose tokens rank `owner` holds, done by `server`."""

    document: int
    start: int
    stop: int
    owner: int
    server: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def work(self) -> int:
        """Pairs of queries and keys."""
        return self.rows * self.stop - self.rows * (self.rows - 1) // 2

    def bytes(self, q_bytes: int, kv_bytes: int) -> int:
        """What travels: queries, outputs as wide, and the keys and values before `stop`; nothing for the owner."""
        return 0 if self.server == self.owner else self.rows * 2 * q_bytes + self.stop * kv_bytes


@dataclass(frozen=True)
class AttentionPlan:
    """tasks over all documents, whose lengths are `documents`; servers: how many there are."""

    documents: tuple[int, ...]
    servers: int
    tasks: tuple[Task, ...]
    q_bytes: int
    kv_bytes: int

    def loads(self) -> list[int]:
        """Work of each server."""
        return [sum(task.work for task in self.tasks if task.server == at) for at in range(self.servers)]

    def moved(self) -> int:
        return sum(task.bytes(self.q_bytes, self.kv_bytes) for task in self.tasks)

    def seconds(self, pairs_per_second: float, bytes_per_second: float) -> float:
        """A step's time where traffic hides behind work: the longer of the slowest server's work and its traffic."""
        traffic = [sum(t.bytes(self.q_bytes, self.kv_bytes) for t in self.tasks if t.server == at) for at in range(self.servers)]
        return max(max(self.loads()) / pairs_per_second, max(traffic) / bytes_per_second)


def split_work(task: Task, work: int, tile: int) -> tuple[Task, Task] | None:
    """The task's last rows that make about `work`, in whole tiles, and the others before them; None where no cut does."""
    for rows in range(tile, task.rows, tile):
        tail = replace(task, start=task.stop - rows)
        if tail.work >= work or rows + tile >= task.rows:
            return tail, replace(task, stop=tail.start)
    return None


@register("core-attention-disaggregation", kind="function")
def plan_attention(
    documents: Sequence[Sequence[int]], servers: int | None = None, tol: float = 0.1, tile: int = 128, q_bytes: int = 2, kv_bytes: int = 2
) -> AttentionPlan:
    """Tasks for lengths of documents by rank, documents[rank][n]: balanced to 1 + tol of the mean and a tile's rows, few bytes moved.

    servers: how many (None: one a rank; rank r holds what server r owns). tile: rows that a kernel takes together. q_bytes, kv_bytes: of a
    token's queries, and of its keys with values.
    """
    count = len(documents) if servers is None else servers
    if not documents or count < 1 or tol < 0 or tile < 1 or any(n < 0 for rank in documents for n in rank):
        raise RegardError(
            f"documents={documents}, servers={servers}, tol={tol}, tile={tile}: expected lengths by rank, and positive numbers"
        )
    lengths = [(n, rank) for rank, own in enumerate(documents) for n in own]
    tasks = [Task(at, 0, n, rank, rank % count) for at, (n, rank) in enumerate(lengths) if n]
    mean = sum(task.work for task in tasks) / count
    loads = [sum(task.work for task in tasks if task.server == at) for at in range(count)]
    for taker in sorted(range(count), key=lambda at: loads[at]):
        while mean - loads[taker] > tol * mean:
            need = mean - loads[taker]
            offers = []
            for at, task in enumerate(tasks):
                spare = loads[task.server] - mean
                if task.server == taker or spare <= 0:
                    continue
                wanted = int(min(spare, need))
                cut = None if task.work <= wanted else split_work(task, wanted, tile)
                if task.work > wanted and (cut is None or cut[0].work > 2 * min(spare, need)):
                    continue  # a whole tile would overshoot
                moving = replace(task if cut is None else cut[0], server=taker)
                offers.append((moving.bytes(q_bytes, kv_bytes) / moving.work, -moving.work, at, moving, cut))
            if not offers:
                break
            _, _, at, moving, cut = min(offers, key=lambda one: one[:3])
            loads[tasks[at].server] -= moving.work
            loads[taker] += moving.work
            tasks[at : at + 1] = [moving] if cut is None else [cut[1], moving]
    return AttentionPlan(tuple(n for n, _ in lengths), count, tuple(tasks), q_bytes, kv_bytes)


def core_attention_tasks(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float | None = None) -> Tensor:
    """Causal attention inside each document, server by server: q (B, H, L, D), k, v (B, Hkv, L, D), the documents one behind another.

    Equal to attention document by document, gradients too. L is the sum of the plan's lengths.
    """
    if q.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[2] != k.shape[2] or q.shape[2] != sum(plan.documents):
        raise RegardError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected {sum(plan.documents)} tokens, as the plan has"
        )
    offsets = [sum(plan.documents[:at]) for at in range(len(plan.documents))]
    found: list[tuple[int, Tensor]] = []
    for server in range(plan.servers):
        for task in (one for one in plan.tasks if one.server == server):
            at = offsets[task.document]
            keys = slice(at, at + task.stop)
            o = attend(q[:, :, at + task.start : at + task.stop], k[:, :, keys], v[:, :, keys], Weighted(mask=Causal()), scale=scale)
            found.append((at + task.start, o))
    if not found:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    return torch.cat([o for _, o in sorted(found, key=lambda one: one[0])], 2)


def head_parallel_bytes(documents: Sequence[Sequence[int]], q_bytes: int, kv_bytes: int) -> int:
    """What context parallelism over heads moves for the same ranks: all queries, outputs, keys and values but a rank's own share."""
    ranks = len(documents)
    return sum(n for rank in documents for n in rank) * (2 * q_bytes + kv_bytes) * (ranks - 1) // ranks
