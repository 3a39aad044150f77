"""Checks of acmil."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import image
from regard.lab.verification import check
from regard.tasks.bags import mixed_bags
from regard.zoo.vision.acmil import ACMIL, Bags, HeadRead, MultiQueryACMIL, acmil_loss, concentration, diversity, stochastic_topk_mask


def by_hand(layer: ACMIL, bag: Tensor, hidden: list[set[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of one bag (N, features), with the masked instances of each branch: logits of branches and bag, weights."""
    h = (bag @ layer.reduce.weight.T).clamp_min(0)
    pool = layer.score
    mixed = torch.tanh(h @ pool.v.weight.T + pool.v.bias) / (1 + torch.exp(-(h @ pool.u.weight.T + pool.u.bias)))
    rows = []
    for k, gone in enumerate(hidden):
        s = mixed @ pool.weights.weight[k] + pool.weights.bias[k]
        e = torch.stack([torch.zeros_like(s[i]) if i in gone else torch.exp(s[i]) for i in range(len(s))])
        rows.append(e / e.sum())
    weights = torch.stack(rows)
    heads = [head[1] for head in layer.heads]  # type: ignore[index]
    branches = torch.stack([weights[k] @ h @ head.weight.T + head.bias for k, head in enumerate(heads)])  # type: ignore[union-attr, operator]
    last = layer.head[1]
    return branches, weights.mean(0) @ h @ last.weight.T + last.bias, weights  # type: ignore[operator]


def loss_by_hand(parts: list[tuple[Tensor, Tensor, Tensor]], labels: Tensor) -> Tensor:
    total: Tensor = torch.zeros((), dtype=F64)
    for (branches, bag, weights), label in zip(parts, labels.tolist(), strict=True):
        k = len(branches)
        total = total - bag.log_softmax(0)[label] - branches.log_softmax(1)[:, label].mean()
        for i in range(k):
            for j in range(i):
                cosine = (weights[i] * weights[j]).sum() / (weights[i].norm() * weights[j].norm())
                total = total + 2 / (k * (k - 1)) * cosine
    return total / len(parts)


@check(
    "acmil",
    "values and gradients of logits, weights and the loss, masked in training by given draws, and whole == a bag at a time by hand",
    below=1e-10,
    control="the first of the largest masked instead of the drawn",
)
def _() -> tuple[float, float]:
    layer, x, labels = drawn(ACMIL(6, 3, 8, 5, 3, masked=4, share=0.5)), image(2, 9, 6), torch.tensor([2, 0])
    keep = torch.arange(9) < torch.tensor([[9], [7]])
    draw, gaps, other = torch.rand(2, 3, 4), [], 0.0
    for training in (True, False):
        out = layer.train(training)(x, keep, draw if training else None)

        def hidden(b: int, drawn_ones: bool, training: bool = training) -> list[set[int]]:
            if not training:
                return [set() for _ in range(3)]
            with torch.no_grad():
                scores = layer.score(torch.relu(layer.reduce(x)))[b]
            found = []
            for k in range(3):
                order = sorted(range(int(keep[b].sum())), key=lambda i: -float(scores[k, i]))[:4]
                ranked = sorted(range(4), key=lambda i: float(draw[b, k, i])) if drawn_ones else range(4)
                found.append({order[i] for i in list(ranked)[:2]})
            return found

        parts = [by_hand(layer, x[b, : int(keep[b].sum())], hidden(b, True)) for b in range(2)]
        gaps.append(gap_with_gradients(acmil_loss(out, labels), loss_by_hand(parts, labels), (x, *layer.parameters())))
        gaps += [naive.gap(out.bag[b], parts[b][1]) for b in range(2)] + [naive.gap(out.branches[b], parts[b][0]) for b in range(2)]
        gaps += [naive.gap(out.weights[b, :, : parts[b][2].shape[1]], parts[b][2]) for b in range(2)]
        if training:
            other = naive.gap(out.bag[0], by_hand(layer, x[0], hidden(0, False))[1])
    return max(gaps), other


@check(
    "acmil", "masked scores that are none of a row's 10 largest, or not 6 of them, in 200 rows of 40", below=0.0, control="masked at random"
)
def _() -> tuple[float, float]:
    scores = torch.randn(200, 40)
    allowed = torch.zeros(200, 40, dtype=torch.bool).scatter(1, scores.argsort(1, descending=True)[:, :10], True)

    def wrong(mask: Tensor) -> float:
        return float((mask & ~allowed).sum() + (mask.sum(1) - 6).abs().sum())

    found = stochastic_topk_mask(scores, 10, 0.6)
    assert float(found.double().sum(0).std()) > 0 and not torch.equal(found, stochastic_topk_mask(scores, 10, 0.6))
    return wrong(found), wrong(torch.rand(200, 40).argsort(1) < 6)


@check("acmil", "diversity of equal branches, off one", below=1e-6, control="of branches apart")
def _() -> tuple[float, float]:
    one = torch.rand(2, 1, 9).softmax(-1)
    apart = torch.eye(3)[None].expand(2, -1, -1)
    return abs(float(diversity(one.expand(-1, 4, -1))) - 1), abs(float(diversity(apart)) - 1)


def area(scores: Tensor, labels: Tensor) -> float:
    """Under the curve of true over false positives."""
    good, bad = scores[labels == 1], scores[labels == 0]
    return float((good[:, None] > bad).double().mean())


def trained_on_bags(branches: int, masked: int, seed: int) -> tuple[float, float]:
    """(weight on the 10 largest, area under the curve) on held-out bags."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = mixed_bags(100, generator)
    model = ACMIL(16, 2, 32, 16, branches, masked)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        acmil_loss(model(x), y).backward()
        optimizer.step()
    x, y = mixed_bags(200, generator)
    with torch.no_grad():
        out: Bags = model.eval()(x)
    gap = out.bag[:, 1] - out.bag[:, 0]
    return float(concentration(out.weights).mean()), area(gap, y)


@check(
    "acmil",
    "weight on a bag's 10 largest of 200 after equal training, mean of 3 seeds (area under the curve more than 0.02 below ABMIL's counts as 1)",
    below=0.6,
    control="ABMIL: one branch, no masking",
)
def _() -> tuple[float, float]:
    runs = [(trained_on_bags(5, 10, seed), trained_on_bags(1, 0, seed)) for seed in range(3)]
    own, plain = ([statistics.mean(run[side][at] for run in runs) for at in range(2)] for side in range(2))
    return own[0] if own[1] >= plain[1] - 0.02 else 1.0, plain[0]


def read_by_hand(net: HeadRead, weights: Tensor, h: Tensor) -> Tensor:
    """weights (heads, N), h (N, dim) -> (dim,)."""
    v = (h @ net.v.weight.T + net.v.bias).unflatten(1, (len(weights), -1))
    out = torch.einsum("hn,nhd->hd", weights, v).flatten() @ net.out.weight.T + net.out.bias
    return (out - out.mean()) / (out.var(correction=0) + 1e-6).sqrt() * net.norm.weight + net.norm.bias  # type: ignore[no-any-return]


@check(
    "acmil",
    "values and gradients with queries of multi-head attention, masked in training by given draws, and whole == a bag at a time by hand",
    below=1e-9,
    control="one set of weights, the heads' mean, for all heads of the bag",
)
def _() -> tuple[float, float]:
    layer, labels = drawn(MultiQueryACMIL(6, 3, 8, 2, 3, masked=4, share=0.5, attention_dropout=0.0)), torch.tensor([2, 0])
    x, keep, draw, gaps, other = image(2, 9, 6), torch.arange(9) < torch.tensor([[9], [7]]), torch.rand(2, 2, 3, 4), [], 0.0
    for training in (True, False):
        out = layer.train(training)(x, keep, draw if training else None)
        loss: Tensor = torch.zeros((), dtype=F64)
        for b in range(2):
            n = int(keep[b].sum())
            h = (x[b, :n] @ layer.reduce.weight.T).clamp_min(0)
            weights, reads = torch.zeros(2, 3, n, dtype=F64), []
            for k in range(3):
                q = (layer.queries[k] @ layer.q[k].weight.T + layer.q[k].bias).unflatten(0, (2, 4))  # type: ignore[operator, union-attr]
                keys = (h @ layer.k[k].weight.T + layer.k[k].bias).unflatten(1, (2, 4))  # type: ignore[operator, union-attr]
                rows = []
                for head in range(2):
                    s = keys[:, head] @ q[head] / 2
                    size = s.detach()
                    order = sorted(range(n), key=lambda i, size=size: -float(size[i]))[:4]  # type: ignore[misc]
                    ranked = sorted(range(4), key=lambda i, at=(b, head, k): float(draw[at][i]))  # type: ignore[misc]
                    e = torch.exp(s)
                    for i in ranked[:2] if training else []:
                        e = e.index_fill(0, torch.tensor(order[i]), 0.0)
                    rows.append(e / e.sum())
                w = torch.stack(rows)
                weights = weights.index_put((torch.arange(2)[:, None], torch.tensor(k), torch.arange(n)), w)
                reads.append(read_by_hand(layer.read[k], w, h))  # type: ignore[arg-type]
            branches = torch.stack([r @ head[1].weight.T + head[1].bias for r, head in zip(reads, layer.heads, strict=True)])  # type: ignore[index]
            mean, last = weights.mean(1), layer.head[1]
            bag = read_by_hand(layer.whole, mean, h) @ last.weight.T + last.bias  # type: ignore[operator]
            blurred = read_by_hand(layer.whole, mean.mean(0).expand(2, -1), h) @ last.weight.T + last.bias  # type: ignore[operator]
            gaps += [naive.gap(out.branches[b], branches), naive.gap(out.bag[b], bag), naive.gap(out.weights[b, :, :, :n], weights)]
            pairs = [
                (weights[a, i] * weights[a, j]).sum() / (weights[a, i].norm() * weights[a, j].norm())
                for a in range(2)
                for i in range(3)
                for j in range(i)
            ]
            loss = loss - bag.log_softmax(0)[labels[b]] - branches.log_softmax(1)[:, labels[b]].mean() + torch.stack(pairs).mean()
            other = max(other, naive.gap(out.bag[b], blurred))
        gaps.append(gap_with_gradients(acmil_loss(out, labels), loss / 2, (x, *layer.parameters())))
    return max(gaps), other
