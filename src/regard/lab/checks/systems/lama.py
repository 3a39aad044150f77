"""Checks of lama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, flops, gap_with_gradients
from regard.lab.verification import check
from regard.zoo.systems.lama import LAMAClassifier, LAMAPool, diversity


def by_hand(layer: LAMAPool, x: Tensor, keep: Tensor, both: bool = True) -> tuple[Tensor, Tensor]:
    """Token by token and head by head. both=False: tokens alone are projected, without the context."""
    documents, weights = [], []
    for row in range(len(x)):
        there = [t for t in range(x.shape[1]) if keep[row, t]]
        c = layer.context if layer.context is not None else sum(x[row, t] for t in there) / len(there)
        table = []
        for t in there:
            f = torch.stack([(x[row, t] * layer.p[:, m]).sum() * ((c * layer.q[:, m]).sum() if both else 1.0) for m in range(layer.heads)])
            f = f / f.square().sum().sqrt() if layer.normalise else f
            table.append(torch.tanh(f) if layer.tanh else f)
        e = torch.stack(table).exp()
        p = e / e.sum(0)
        documents.append(torch.cat([sum(p[i, m] * x[row, t] for i, t in enumerate(there)) for m in range(layer.heads)]))
        full = torch.zeros(layer.heads, x.shape[1], dtype=F64)
        full[:, there] = p.T.detach()
        weights.append(full)
    return torch.stack(documents), torch.stack(weights)


@check(
    "lama",
    "documents, weights and gradients equal loops over tokens and heads: both contexts, with and without tanh and unit length, padding",
    below=1e-11,
    control="without the context in the product",
)
def _() -> tuple[float, float]:
    own, other = 0.0, []
    for options in ({}, {"context": "mean"}, {"tanh": False}, {"normalise": True}, {"context": "mean", "normalise": True, "tanh": False}):
        layer, x = LAMAPool(6, 3, **options).double(), torch.randn(2, 5, 6, dtype=F64, requires_grad=True)
        keep = torch.tensor([[True, True, False, True, False], [True] * 5])
        leaves = (x, *layer.parameters())
        document, weights = layer(x, keep)
        truth, p = by_hand(layer, x, keep)
        own = max(own, gap_with_gradients(document, truth, leaves), naive.gap(weights, p))
        assert bool((weights[0, :, [2, 4]] == 0).all())
        other.append(naive.gap(document, by_hand(layer, x, keep, both=False)[0]))
    return own, min(other)


@check("lama", "scores summed over heads are h^T (P Q^T) c", below=1e-12, control="h^T (Q P^T) c")
def _() -> tuple[float, float]:
    layer, x = LAMAPool(6, 4).double(), torch.randn(2, 5, 6, dtype=F64)
    found, c = layer.scores(x).sum(-1), layer.context
    assert c is not None
    return naive.gap(found, x @ (layer.p @ layer.q.T) @ c), naive.gap(found, x @ (layer.q @ layer.p.T) @ c)


@check("lama", "longer padding and other tokens' order change nothing: gap of logits", below=1e-12, control="padding that the GRU reads")
def _() -> tuple[float, float]:
    model, ids = LAMAClassifier(20, 3, 8, 5, 4).double().eval(), torch.randint(20, (2, 7))
    sizes = torch.tensor([7, 4])
    rows = [model(ids[row : row + 1, :n]) for row, n in enumerate(sizes.tolist())]
    longer = torch.cat((ids, torch.randint(20, (2, 6))), 1)
    keep = torch.arange(13) < sizes[:, None]
    order = torch.randperm(7)
    x = torch.randn(2, 7, 10, dtype=F64)
    document, p = model.pool(x)
    again, q = model.pool(x[:, order])
    read = model.head(model.pool(model.gru(model.embed(longer))[0], keep)[0])
    own = max(naive.gap(model(longer, keep), torch.cat(rows)), naive.gap(document, again), naive.gap(p[..., order], q))
    return own, naive.gap(read, torch.cat(rows))


@check(
    "lama",
    "parameters are 2 dim m + dim, and four times as many tokens cost four times as much: excess",
    below=0.0,
    control="self-attention",
)
def _() -> tuple[float, float]:
    layer, full = LAMAPool(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)

    def excess(run: Any, parameters: int) -> float:
        costs = [flops(lambda n=n: run(torch.randn(1, n, 16))) for n in (50, 200)]
        return float(parameters - (2 * 16 * 4 + 16) + costs[1] - 4 * costs[0])

    context = 2 * 16 * 4  # (Q^T c) is made once, whatever the length
    sizes = [sum(p.numel() for p in one.parameters()) for one in (layer, full)]
    own = excess(layer, sizes[0]) + 3 * context
    return own, excess(lambda x: full(x, x, x), sizes[1])


@check("lama", "diversity penalty: ||A^T A - I||^2 by loops, mean over the batch", below=1e-12, control="the sum over the batch")
def _() -> tuple[float, float]:
    a = torch.rand(3, 2, 5, dtype=F64)
    rows = [sum(((a[b, i] * a[b, j]).sum() - float(i == j)) ** 2 for i in range(2) for j in range(2)) for b in range(3)]
    truth = torch.stack(rows)
    return naive.gap(diversity(a), truth.mean()), naive.gap(diversity(a), truth.sum())


@check(
    "lama",
    "which of four words stands among 60: the less of accuracy and how often the word is some head's likeliest, after 150 steps",
    above=0.9,
    control="the mean of the same GRU's first states, with a linear layer",
)
def _() -> tuple[float, float]:
    def batch(rows: int = 48) -> tuple[Tensor, Tensor, Tensor]:
        ids, labels, at = torch.randint(4, 40, (rows, 60)), torch.randint(4, (rows,)), torch.randint(60, (rows,))
        ids[torch.arange(rows), at] = labels
        return ids, labels, at

    model = LAMAClassifier(40, 4, 16, 16, 4)
    mean = torch.nn.Linear(32, 4)
    frozen = LAMAClassifier(40, 4, 16, 16, 4)
    optimizer = torch.optim.Adam([*model.parameters(), *mean.parameters()], 1e-2)
    for _ in range(150):
        ids, labels, _ = batch()
        with torch.no_grad():
            states = frozen.encode(ids).mean(1)
        losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in (model(ids), mean(states))]
        optimizer.zero_grad()
        (losses[0] + losses[1]).backward()
        optimizer.step()
    with torch.no_grad():
        ids, labels, at = batch(400)
        right = (model(ids).argmax(-1) == labels).float().mean()
        hits = (model.pool(model.encode(ids))[1].argmax(-1) == at[:, None]).any(1).float().mean()
        return float(min(right, hits)), float((mean(frozen.encode(ids).mean(1)).argmax(-1) == labels).float().mean())
