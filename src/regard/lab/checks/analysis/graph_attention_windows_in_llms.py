"""Checks of graph-attention-windows-in-llms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import regard
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.analysis.graph_attention_windows_in_llms import (
    attention_shift,
    graph_attention_report,
    graph_window,
    window_experiment,
)


def drawn(seed: int) -> tuple[Tensor, Tensor, int]:
    """(edges, places, length) of a random graph of 2 to 13 nodes among up to 40 tokens."""
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 14, (), generator=g))
    length = n + int(torch.randint(1, 25, (), generator=g))
    edges = torch.randint(n, (int(torch.randint(1, 2 * n, (), generator=g)), 2), generator=g)
    return edges, torch.randperm(length, generator=g)[:n].sort().values, length


def searched(edges: Tensor, n: int) -> list[list[int]]:
    """Hops between all nodes by breadth-first search; 99 without a path."""
    beside: list[set[int]] = [set() for _ in range(n)]
    for a, b in edges.tolist():
        beside[a].add(b)
        beside[b].add(a)
    found = []
    for start in range(n):
        hops, front = {start: 0}, [start]
        while front:
            node = front.pop(0)
            for other in beside[node] - hops.keys():
                hops[other] = hops[node] + 1
                front.append(other)
        found.append([hops.get(i, 99) for i in range(n)])
    return found


def by_hand(edges: Tensor, at: Tensor, length: int, k: int, both: bool, last: str) -> Tensor:
    hops, place, n = searched(edges, len(at)), {int(t): i for i, t in enumerate(at)}, len(at)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            if i in place and j in place:
                a, b = place[i], place[j]
                reach = 1 if last == "causal" and b == n - 1 and a != b else k
                mask[i, j] = (hops[a][b] <= reach or (last == "causal" and a == n - 1)) and (both or j <= i)
            else:
                mask[i, j] = j <= i
    return mask


@check(
    "graph-attention-windows-in-llms", "masks of 20 graphs, k = 1..4: pairs unlike breadth-first search", below=0.0, control="k + 1 hops"
)
def _() -> tuple[float, float]:
    wrong, other = 0, 0
    for seed in range(20):
        edges, at, length = drawn(seed)
        for k in range(1, 5):
            for both, last in ((True, "causal"), (True, "window"), (False, "causal"), (False, "window")):
                found = graph_window([edges], [at], length, k, bidirectional=both, last=last)[0, 0]
                wrong += int((found != by_hand(edges, at, length, k, both, last)).sum())
                other += int((found != by_hand(edges, at, length, k + 1, both, last)).sum())
        full = graph_window([edges], [at], length, None)[0, 0]
        wrong += int((~full[at[:, None], at]).sum())
    return float(wrong), float(other)


@check(
    "graph-attention-windows-in-llms", "attention under the mask, padded batch: loops over pairs in float64", below=1e-10, control="causal"
)
def _() -> tuple[float, float]:
    (e1, a1, t1), (e2, a2, t2) = drawn(3), drawn(4)
    length = max(t1, t2)
    keep = torch.arange(length) >= torch.tensor([[0], [2]])
    a2 = a2[a2 >= 2]
    e2 = e2[(e2 < len(a2)).all(1)]
    mask = graph_window([e1, e2], [a1, a2], length, 2, keep=keep)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 4, generator=g, dtype=F64) for _ in range(3))
    found = regard.attend(q, k, v, "softmax", mask=mask)
    truth, causal = torch.zeros_like(q), torch.zeros_like(q)
    for b, (edges, at) in enumerate(((e1, a1), (e2, a2))):
        hand = by_hand(edges, at, length, 2, True, "causal")
        for out, seen in ((truth, hand), (causal, torch.ones(length, length).tril().bool())):
            for h in range(2):
                for i in range(length):
                    js = [j for j in range(length) if seen[i, j] and keep[b, j]]
                    e = [math.exp(float(q[b, h, i] @ k[b, h, j]) / 2) for j in js]
                    for j, x in zip(js, e, strict=True):
                        out[b, h, i] += x / sum(e) * v[b, h, j]
    return naive.gap(found, truth), naive.gap(found, causal)


@check(
    "graph-attention-windows-in-llms", "the report on planted attention, ring by ring and mass by mass", below=1e-9, control="another graph"
)
def _() -> tuple[float, float]:
    edges = torch.tensor([[4, 0], [2, 4], [2, 1], [3, 3]])
    at, length = torch.tensor([1, 2, 4, 5, 6]), 9
    g = torch.Generator().manual_seed(1)
    a = torch.rand(2, 1, 3, length, length, generator=g, dtype=F64).tril().softmax(-1)

    def gap(pairs: Tensor) -> float:
        found, hops = graph_attention_report(list(a), [pairs], [at]), searched(edges, 5)
        worst = 0.0
        for layer in range(2):
            for h in range(3):
                w = a[layer, 0, h]
                for r in range(5):
                    ring = [float(w[6, at[i]]) for i in range(5) if hops[4][i] == r]
                    got = float(found.rings[layer, h, r])
                    worst = max(worst, abs(got - sum(ring) / len(ring)) if ring and got == got else float(bool(ring) or got == got))
                xy = [(float(w[at[i], at[j]]), float(hops[i][j] == 1)) for i in range(5) for j in range(5) if i != j]
                truth = torch.corrcoef(torch.tensor(xy, dtype=F64).T)[0, 1]
                text = sum(float(w[t, s]) for t in (7, 8) for s in at) / 2
                between = sum(float(w[t, s]) for t in at for s in at) / 5
                sink = sum(float(w[t, 0]) for t in at) / 5
                for x, y in ((found.correlation, truth), (found.text_to_node, text), (found.node_to_node, between), (found.sink, sink)):
                    worst = max(worst, abs(float(x[layer, h]) - float(y)))
        return worst

    return gap(edges), gap(torch.tensor([[4, 1], [3, 4], [0, 1]]))


@check(
    "graph-attention-windows-in-llms",
    "shift of the same run, and its distance from loops for another",
    below=1e-9,
    control="against itself",
)
def _() -> tuple[float, float]:
    g = torch.Generator().manual_seed(2)
    a, b = (torch.rand(1, 2, 1, 6, 6, generator=g, dtype=F64).softmax(-1) for _ in range(2))
    at = torch.tensor([1, 2, 4])
    found, truth = attention_shift(list(a), list(b), [at, at]), 0.0
    for e in range(2):
        p, q = ([float(x[0, e, 0, 4, t]) / sum(float(x[0, e, 0, 4, s]) for s in at) for t in at] for x in (a, b))
        truth += sum(x * math.log(2 * x / (x + y)) + y * math.log(2 * y / (x + y)) for x, y in zip(p, q, strict=True)) / 4
    same = float(attention_shift(list(a), list(a), [at, at]).abs().max())
    return abs(float(found) - truth) + same, truth - same


@check(
    "graph-attention-windows-in-llms",
    "majority class of the neighbours: a decoder trained and read with windows of 1 and 2, the worse",
    above=0.93,
    control="full window: no topology",
)
def _() -> tuple[float, float]:
    return min(window_experiment(k, steps=120)[0] for k in (1, 2)), window_experiment(None, steps=120)[0]
