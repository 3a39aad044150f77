"""Checks of chunked-tabpfn."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.gaps import gaps
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.tasks.tables import tables
from regard.tasks.training import fit
from regard.zoo.systems.chunked_tabpfn import TabPFNLite, chunked_attention, chunking


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@check(
    "chunked-tabpfn",
    "chunks of 1, 7, 64 and all queries and keys, rows of the batch 3 at a time, logits times 500: gap to attention at once, and of gradients",
    below=1e-10,
    control="keys of the first chunk alone",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for sharp in (1.0, 500.0):
        inputs = [torch.randn(5, h, n, 8, dtype=torch.float64, requires_grad=True) for h, n in ((4, 65), (2, 83), (2, 83))]
        q, k, v = inputs[0] * sharp, *inputs[1:]
        truth = whole(q, k, v)
        for q_chunk, k_chunk, rows in ((1, None, 9), (7, 7, 3), (64, 64, 2), (65, 83, 5), (64, 1, 5)):
            found = chunked_attention(q, k, v, q_chunk, k_chunk, rows)
            own.append(gaps(found, truth, inputs) if sharp == 1.0 else naive.gap(found, truth))
        own.append(naive.gap(chunked_attention(q, k, v, 7, 7, scale=0.5), whole(q * math.sqrt(8) / 2, k, v)))
        other.append(naive.gap(chunked_attention(q, k[:, :, :64], v[:, :, :64], 7, 7), truth))
    return max(own), min(other)


@check(
    "chunked-tabpfn",
    "largest tensor that 64 queries need over 1024 keys, 64 at a time, over that for 256 keys",
    below=1.05,
    control="softmax at once",
)
def _() -> tuple[float, float]:
    def largest(keys: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        q, k = torch.randn(1, 2, 64, 4), torch.randn(1, 2, keys, 4)
        return largest_tensor(lambda: attend(q, k, k))

    def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked_attention(q, k, v, 64, 64)

    return largest(1024, chunks) / largest(256, chunks), largest(1024, whole) / largest(256, whole)


def by_hand(model: Any, x: Tensor, y: Tensor, leak: bool = False) -> Tensor:
    """Logits (m, classes) of rows behind the first len(y), one table x (N, F); leak: rows read test rows too."""
    n, train, classes = len(x), len(y), model.classes
    x = (x - x[:train].mean(0)) / x[:train].var(0, correction=0).sqrt()
    groups = -(-x.shape[1] // model.group)
    x = torch.cat((x, x.new_zeros(n, groups * model.group - x.shape[1])), 1).view(n, groups, model.group)
    target = x.new_zeros(n, classes + 1)
    for row in range(n):
        target[row, int(y[row]) if row < train else classes] = 1
    h = torch.stack([model.x_in(x[:, g]) + model.place_in(model.place[g]) for g in range(groups)] + [model.y_in(target)], 1)

    def norm(t: Tensor) -> Tensor:
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    def heads(part: Any, rows: Tensor, read: Tensor, first: bool = False) -> Tensor:
        size, outs = rows.shape[-1] // part.heads, []
        q, (k, v) = rows @ part.q.weight.T, (read @ part.kv.weight.T).chunk(2, -1)
        for head in range(part.heads):
            at, of = (slice(size * i, size * (i + 1)) for i in (head, 0 if first else head))
            outs.append((q[:, at] @ k[:, of].T / math.sqrt(size)).softmax(-1) @ v[:, of])
        return torch.cat(outs, 1) @ part.out.weight.T

    for layer in model.layers:
        h = norm(h + torch.stack([heads(layer.features, row, row) for row in h]))
        moved = []
        for g in range(h.shape[1]):
            read = h[:, g] if leak else h[:train, g]
            moved.append(torch.cat((heads(layer.rows, h[:train, g], read), heads(layer.rows, h[train:, g], read, layer.multiquery_test))))
        h = norm(h + torch.stack(moved, 1))
        h = norm(h + F.gelu(h @ layer.mlp[0].weight.T) @ layer.mlp[2].weight.T)
    y_out = F.gelu(h[train:, -1] @ model.head[0].weight.T + model.head[0].bias)
    return y_out @ model.head[2].weight.T + model.head[2].bias


def lite(**options: object) -> TabPFNLite:
    model = TabPFNLite(classes=3, dim=16, heads=2, layers=2, **options).double().eval()  # type: ignore[arg-type]
    for p in model.parameters():
        p.data.normal_(std=0.4)
    return model


@check(
    "chunked-tabpfn",
    "TabPFNLite, groups of 1 and 2 features, with and without one head's keys for test rows: gap of probabilities to the layers by hand, at once and in chunks",
    below=1e-9,
    control="test rows read one another",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    own, other = [], []
    for options in ({}, {"group": 2, "multiquery_test": True}):
        model = lite(**options)
        x, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 3, (33,))
        truth = by_hand(model, x, y)
        own.append(naive.gap(model(x[None], y[None])[0], truth))
        for chunks in ({}, {"q_chunk": 5, "k_chunk": 7, "batch_chunk": 4}):
            fitted = model.chunked(**chunks).fit(x[:33], y)
            own.append(naive.gap(fitted.predict_proba(x[33:]), truth.softmax(-1)))
            own.append(naive.gap(torch.cat([fitted.predict_proba(row[None]) for row in x[33:]]), truth.softmax(-1)))  # one by one
        with chunking(4, 6, 3):
            own.append(
                naive.gap(
                    torch.nn.functional.scaled_dot_product_attention(*(x[None, None] for _ in range(3))),
                    whole(*(x[None, None] for _ in range(3))),
                )
            )
        other.append(naive.gap(truth, by_hand(model, x, y, leak=True)))
    return max(own), min(other)


@check("chunked-tabpfn", "training rows in another order: change of probabilities", below=1e-9, control="every second row left out")
def _() -> tuple[float, float]:
    model, x, y = lite(), torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (33,))
    truth, order = model.fit(x[:33], y).predict_proba(x[33:]), torch.randperm(33)
    return (
        naive.gap(model.chunked(q_chunk=8, k_chunk=8).fit(x[order], y[order]).predict_proba(x[33:]), truth),
        naive.gap(model.fit(x[:33:2], y[::2]).predict_proba(x[33:]), truth),
    )


@functools.cache
def trained(seed: int) -> TabPFNLite:
    """Trained on tables of 2 features and 32 rows, of which 6 to 26 are given with their classes."""
    torch.manual_seed(seed)
    model = TabPFNLite(layers=2)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        return (*tables(12, 32, 2, generator), int(torch.randint(6, 27, (1,), generator=generator)))

    def loss(batch: tuple[Tensor, Tensor, int]) -> Tensor:
        x, y, n = batch
        return F.cross_entropy(model(x, y[:, :n]).flatten(0, 1), y[:, n:].flatten())

    fit(model, draw, loss, 220, lr=4e-3, seed=seed)
    return model


@functools.cache
def accuracy(seed: int, rows: int, shuffled: bool = False) -> float:
    """Over 10 new tables, read in chunks. shuffled: the context's classes in another order."""
    model, hits = trained(seed).chunked(q_chunk=300, k_chunk=300, batch_chunk=300), []
    x, y = tables(10, rows + 128, 2, torch.Generator().manual_seed(77))
    for table, classes in zip(x, y, strict=True):
        own = classes[:rows].roll(rows // 2) if shuffled else classes[:rows]
        hits.append(float((model.fit(table[:rows], own).predict(table[rows:]) == classes[rows:]).float().mean()))
    return statistics.mean(hits)


@check(
    "chunked-tabpfn",
    "after 220 steps on tables of 32 rows: accuracy on new ones with 512 rows of context, read in chunks, three seeds' median",
    above=0.85,
    control="the context's classes shuffled",
)
def _() -> tuple[float, float]:
    return tuple(statistics.median(accuracy(seed, 512, shuffled) for seed in range(3)) for shuffled in (False, True))  # type: ignore[return-value]


@check(
    "chunked-tabpfn",
    "accuracy with 512 rows of context less that with 8, three seeds' median",
    above=0.01,
    control="the classes of the 512 shuffled",
)
def _() -> tuple[float, float]:
    runs = [[accuracy(seed, 512, shuffled) - accuracy(seed, 8) for seed in range(3)] for shuffled in (False, True)]
    return statistics.median(runs[0]), statistics.median(runs[1])
