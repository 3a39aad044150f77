"""Checks of mqsa-ted."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.verification import check
from regard.zoo.systems.mqsa_ted import MQSATED, QueryBlock, ranking, transition_counts


def small(**options: object) -> MQSATED:
    torch.manual_seed(3)
    model = MQSATED(20, 8, length=9, **options).double().eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    model.embed.weight.data[0] = 0
    return model


def ln(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    y = x - x.mean()
    return y / (y.square().mean() + 1e-24).sqrt() * layer.weight + layer.bias


def block(one: QueryBlock, x: list[Tensor], q: list[Tensor], keep: list[bool]) -> list[Tensor]:
    d, out = x[0].shape[-1] // one.heads, []
    for t in range(len(x)):
        if not keep[t]:
            out.append(torch.zeros_like(x[t]))
            continue
        y, seen, parts = ln(q[t], one.norm1), [j for j in range(t + 1) if keep[j]], []
        query, keys, values = one.q(y), [one.k(x[j]) for j in seen], [one.v(x[j]) for j in seen]
        for h in range(0, len(y), d):
            p = naive.softmax(torch.stack([(query[h : h + d] * k[h : h + d]).sum() * d**-0.5 for k in keys]))
            parts.append(sum(w * v[h : h + d] for w, v in zip(p, values, strict=True)))
        u = ln(torch.cat(parts) + y, one.norm2)
        out.append(u + one.down(torch.relu(one.up(u))))
    return out


def by_hand(model: MQSATED, items: Tensor, wide: bool = True) -> Tensor:
    """Sequence by sequence and item by item. wide=False: queries of single items in the long branch."""
    rows = []
    for row in items:
        n, keep = len(row), (row != 0).tolist()
        x = [(model.embed.weight[i] * 8**0.5 + model.place.weight[9 - n + t]) * float(keep[t]) for t, i in enumerate(row.tolist())]
        short = long = x
        for one in model.short_blocks:
            short = block(one, short, short, keep)
        for one in model.long_blocks:
            windows = [[j for j in range(max(0, t - model.long + 1 if wide else t), t + 1) if keep[j]] for t in range(n)]
            means = [sum((long[j] for j in w), torch.zeros(8, dtype=F64)) / max(1, len(w)) for w in windows]
            long = block(one, long, means, keep)
        mixed = [
            model.alpha * ln(a, model.short_norm) + (1 - model.alpha) * ln(b, model.long_norm) for a, b in zip(short, long, strict=True)
        ]
        rows.append(torch.stack([model.embed.weight[1:] @ y for y in mixed]))
    return torch.stack(rows)


ITEMS = torch.tensor([[0, 0, 5, 3, 9, 1, 20], [4, 4, 2, 8, 19, 7, 6], [0, 0, 0, 0, 0, 0, 11]])


@check(
    "mqsa-ted",
    "scores and gradients equal loops over items: padding, two blocks, two heads, windows of 3 and 2",
    below=1e-9,
    control="queries of single items",
)
def _() -> tuple[float, float]:
    own, other = 0.0, []
    for options in ({}, {"blocks": 2, "long": 2, "alpha": 0.3}, {"heads": 2, "hidden": 5}):
        model = small(**options)
        there = ITEMS != 0
        found, truth = (x[there] for x in (model(ITEMS), by_hand(model, ITEMS)))
        own = max(own, gap_with_gradients(found, truth, tuple(model.parameters())))
        other.append(naive.gap(found, by_hand(model, ITEMS, wide=False)[there]))
    return own, min(other)


@check(
    "mqsa-ted",
    "windows of one item and the same weights: gap between the branches, and alpha = 1 beside the short branch",
    below=1e-12,
    control="windows of three",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    gaps = []
    for long in (1, 3):
        model = small(long=long)
        model.long_blocks, model.long_norm = copy.deepcopy(model.short_blocks), copy.deepcopy(model.short_norm)
        gaps.append(naive.gap(*model.hidden(ITEMS[1:2])))
        model.alpha = 1.0
        gaps[-1] += naive.gap(model(ITEMS), model.hidden(ITEMS)[0] @ model.embed.weight[1:].T)
    return gaps[0], gaps[1]


@check("mqsa-ted", "later items, and fewer or more padding before: change of scores", below=1e-12, control="another first item")
@torch.no_grad()
def _() -> tuple[float, float]:
    model, items = small(), ITEMS[:1]
    later, first = items.clone(), items.clone()
    later[0, -1], first[0, 2] = 2, 2
    truth = model(items)
    own = max(naive.gap(model(later)[:, :-1], truth[:, :-1]), naive.gap(model(items[:, 2:]), truth[:, 2:]))
    own = max(own, naive.gap(model(torch.nn.functional.pad(items, (2, 0)))[:, 4:], truth[:, 2:]))
    return own, naive.gap(model(first)[:, 3:], truth[:, 3:])


@check(
    "mqsa-ted",
    "losses by hand: cross-entropy with padding as a class, distillation with its even teachers, squares: gap of values and slopes",
    below=1e-9,
    control="no class for padding",
)
def _() -> tuple[float, float]:
    model = small()
    targets = torch.cat((ITEMS[:, 1:], torch.tensor([[7], [0], [3]])), 1)
    counts = transition_counts(ITEMS, 20, 2)
    loops = torch.zeros(21, 21)
    for row in ITEMS.tolist():
        for t in range(7):
            for s in (1, 2):
                if t + s < 7 and row[t] and row[t + s]:
                    loops[row[t], row[t + s]] += 1
    assert torch.equal(counts, loops)
    scores = by_hand(model, ITEMS)
    zero, rows, bare = torch.zeros(1, dtype=F64), [], []
    for b in range(3):
        for t in range(7):
            if targets[b, t]:
                rows.append(torch.cat((zero, scores[b, t])).logsumexp(0) - scores[b, t, targets[b, t] - 1])
                bare.append(scores[b, t].logsumexp(0) - scores[b, t, targets[b, t] - 1])
    kd = []
    for item in ITEMS[ITEMS != 0].tolist():
        row = loops[item, 1:].double()
        teacher = naive.softmax(row / max(float(row.max()), 1.0) / 0.1)
        logits = torch.stack([8**0.5 * (model.embed.weight[item] * model.embed.weight[j]).sum() / 0.1 for j in range(1, 21)])
        kd.append(-(teacher * (logits - logits.logsumexp(0))).sum())
    squares = torch.stack([p.square().sum() for p in model.parameters()]).sum() / 2
    truth = torch.stack(rows).mean() + 0.1 * torch.stack(kd).mean() + 1e-4 * squares
    found, parameters = model.total(ITEMS, targets, counts), [p for name, p in model.named_parameters() if name != "embed.weight"]
    own = gap_with_gradients(found[None], truth[None], tuple(parameters))
    return own, naive.gap(model.loss(ITEMS, targets), torch.stack(bare).mean())


@check("mqsa-ted", "distillation at the teacher's own logits, less the teacher's entropy", below=1e-9, control="at random embeddings")
@torch.no_grad()
def _() -> tuple[float, float]:
    model = MQSATED(4, 4, tau=1.0).double().eval()
    counts = torch.rand(5, 5, dtype=F64)
    counts[0] = counts[:, 0] = 0
    counts = (counts + counts.T) / 2 + 3 * torch.diag(torch.tensor([0.0, 1, 1, 1, 1], dtype=F64))
    top = counts[1:, 1:].amax(1)
    counts[1:, 1:] /= top.max()
    counts[torch.arange(1, 5), torch.arange(1, 5)] = 1.0  # every row's largest is 1, so that the teacher's logits are the counts
    values, vectors = torch.linalg.eigh(counts[1:, 1:])
    teacher = counts[1:, 1:].softmax(-1)
    entropy = -(teacher * teacher.log()).sum(-1).mean()
    items = torch.arange(1, 5)
    model.embed.weight.data[1:] = torch.randn(4, 4, dtype=F64)
    other = float(model.distillation(counts, items) - entropy)
    model.embed.weight.data[1:] = vectors * (values.clamp_min(0) / 2).sqrt()
    assert float(values.min()) > 0
    return abs(float(model.distillation(counts, items) - entropy)), other


@check(
    "mqsa-ted",
    "items that follow a table 3 times in 10, 150 items, 200 users, three epochs, mean of three seeds: HR@10 with distillation less without",
    above=0.03,
    control="transitions of other items distilled",
)
def _() -> tuple[float, float]:
    gains = [0.0, 0.0]
    for seed in range(3):
        torch.manual_seed(seed)
        table = torch.cat((torch.zeros(1, dtype=torch.long), torch.randperm(150) + 1))
        rows = [torch.randint(1, 151, (200,))]
        for _ in range(15):
            rows.append(torch.where(torch.rand(200) < 0.3, table[rows[-1]], torch.randint(1, 151, (200,))))
        sequences, hits = torch.stack(rows, 1), []
        counts = transition_counts(sequences, 150)
        wrong = counts[torch.cat((torch.zeros(1, dtype=torch.long), torch.randperm(150) + 1))]
        for kd, given in ((0.0, counts), (0.1, counts), (0.1, wrong)):
            torch.manual_seed(seed)
            model = MQSATED(150, 32, length=16)
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            for _ in range(3):
                for batch in torch.randperm(200).split(50):
                    optimizer.zero_grad()
                    model.total(sequences[batch, :-1], sequences[batch, 1:], given, kd).backward()
                    optimizer.step()
            with torch.no_grad():
                hits.append(ranking(model.eval()(sequences[:, :-1])[:, -1], table[sequences[:, -2]])[0])
        gains = [gain + (hit - hits[0]) / 3 for gain, hit in zip(gains, hits[1:], strict=True)]
    return gains[0], gains[1]


@check("mqsa-ted", "HR@k and NDCG@k by hand, ties counted against: gap", below=1e-6, control="ranks from one")
def _() -> tuple[float, float]:
    scores, targets = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.5, 0.2]]), torch.tensor([3, 1])
    hit, gain = ranking(scores, targets, 2)
    few, none = ranking(scores, targets, 1)
    return max(abs(hit - 1), abs(gain - 1 / math.log2(3)), few, none), abs(gain - 1 / math.log2(2))
