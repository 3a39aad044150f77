"""Checks of rollout-and-flow."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from scipy.stats import spearmanr
from torch import Tensor, nn

from regard import taps
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.decoder import Block
from regard.tasks.training import fit
from regard.zoo.analysis.rollout_and_flow import blank_out, flow, input_gradients, rank_correlation, rollout


def maps(layers: int = 3, length: int = 4, heads: int = 2) -> list[Tensor]:
    return [torch.randn(2, heads, length, length, dtype=F64).mul(2).softmax(-1) for _ in range(layers)]


def augmented(attentions: list[Tensor]) -> list[Tensor]:
    """0.5 W + 0.5 I of the mean over heads."""
    return [0.5 * sum(a[:, h] for h in range(a.shape[1])) / a.shape[1] + 0.5 * torch.eye(a.shape[-1], dtype=F64) for a in attentions]


@check(
    "rollout-and-flow", "rollout: sum over all paths of products, rows of sum one", below=1e-12, control="layers multiplied the other way"
)
def _() -> tuple[float, float]:
    attentions = maps()
    whole, truth = augmented(attentions), torch.zeros(2, 4, 4, dtype=F64)
    for b, i, j in itertools.product(range(2), range(4), range(4)):
        for m, n in itertools.product(range(4), range(4)):
            truth[b, i, j] += whole[2][b, i, m] * whole[1][b, m, n] * whole[0][b, n, j]
    found = rollout(attentions)
    identity = [torch.eye(4, dtype=F64).expand(2, 2, 4, 4)] * 3
    own = max(
        naive.gap(found, truth),
        naive.gap(found.sum(-1), torch.ones(2, 4, dtype=F64)),
        naive.gap(rollout(identity), identity[0][:, 0]),
        naive.gap(rollout(attentions, every_layer=True)[:, 1], whole[1] @ whole[0]),
    )
    return own, naive.gap(rollout(attentions[::-1]), truth)


@check(
    "rollout-and-flow",
    "without the residual, heads by max, min or sum, and half of the weights discarded: equal loops",
    below=1e-12,
    control="heads by their mean, nothing discarded",
)
def _() -> tuple[float, float]:
    attentions, gaps = maps(), []
    for name, fuse in (("max", torch.amax), ("min", torch.amin), ("sum", torch.sum)):
        first, second, third = (fuse(a, 1) for a in attentions)
        gaps.append(naive.gap(rollout(attentions, residual=False, head_fuse=name), third @ second @ first))
    kept = []
    for a in attentions:
        w = a.mean(1).clone()
        for b in range(2):
            order = sorted((float(w[b, i, j]), i, j) for i in range(4) for j in range(4))
            for _, i, j in order[:8]:
                if (i, j) != (0, 0):
                    w[b, i, j] = 0.0
        w = w + torch.eye(4, dtype=F64)
        kept.append(w / w.sum(-1, keepdim=True))
    truth = kept[2] @ kept[1] @ kept[0]
    return max(*gaps, naive.gap(rollout(attentions, discard_ratio=0.5), truth)), naive.gap(rollout(attentions), truth)


def best_flow(whole: list[Tensor], source: int, sink: int) -> float:
    """The same maximum flow as a linear program over the edges: conservation at every inner node."""
    layers, n = len(whole), whole[0].shape[-1]
    edges = [(level, i, j) for level in range(layers) for i in range(n) for j in range(n)]  # from (level + 1, i) to (level, j)
    rows = []
    for level, node in itertools.product(range(1, layers), range(n)):
        rows.append([float(e[0] == level - 1 and e[1] == node) - float(e[0] == level and e[2] == node) for e in edges])
    ends = [[float(e[0] == layers - 1 and e[1] != source)] for e in edges]
    limits = [(0, 0 if ends[at][0] or (e[0] == 0 and e[2] != sink) else float(whole[e[0]][e[1], e[2]])) for at, e in enumerate(edges)]
    found = linprog([-float(e[0] == 0) for e in edges], A_eq=rows, b_eq=[0.0] * len(rows), bounds=limits)
    return -float(found.fun)


@check(
    "rollout-and-flow",
    "flow of every pair, and of a middle layer: the value of a linear program",
    below=1e-8,
    control="rollout in its place",
)
def _() -> tuple[float, float]:
    attentions = maps()
    found = flow(attentions, normalise=False, every_layer=True)
    truth = torch.zeros(2, 2, 4, 4, dtype=F64)
    for b, i, j in itertools.product(range(2), range(4), range(4)):
        whole = [w[b] for w in augmented(attentions)]
        truth[b, 0, i, j], truth[b, 1, i, j] = best_flow(whole[:2], i, j), best_flow(whole, i, j)
    shares = flow(attentions, queries=[2, 0])
    own = max(naive.gap(found[:, 1:], truth), naive.gap(shares, (truth[:, 1] / truth[:, 1].sum(-1, keepdim=True))[:, [2, 0]]))
    return own, naive.gap(rollout(attentions), truth[:, 1])


@check(
    "rollout-and-flow",
    "three layers of sharp maps with a residual and tanh: rank correlation with ablation, the lower of rollout's and flow's",
    above=0.7,
    control="raw attention of the last layer",
)
def _() -> tuple[float, float]:
    attentions = [torch.randn(12, 2, 8, 8, dtype=F64).mul(4).softmax(-1) for _ in range(3)]

    def score(x: Tensor) -> Tensor:
        for w in augmented(attentions):
            x = torch.tanh(w @ x)
        return x[:, 0].sum(-1)

    def probability(ids: Tensor) -> Tensor:
        return score(0.3 * (ids > 0).to(F64)[..., None])

    ids = torch.ones(12, 8, dtype=torch.long)
    truth = blank_out(probability, ids, 0)
    by_hand = torch.stack([probability(ids) - probability(ids * (torch.arange(8) != j)) for j in range(8)], 1)
    slopes = input_gradients(score, torch.full((12, 8, 1), 0.3, dtype=F64))
    read = {"rollout": rollout(attentions)[:, 0], "flow": flow(attentions, queries=[0])[:, 0], "raw": attentions[-1].mean(1)[:, 0]}
    found = {name: float(rank_correlation(x, truth).mean()) for name, x in read.items()}
    whole = (
        min(found["rollout"], found["flow"]) if naive.gap(truth, by_hand) == 0 and float(rank_correlation(slopes, truth).min()) > 0.9 else 0
    )
    return whole, found["raw"]


@check("rollout-and-flow", "rank correlation equals scipy's, with ties", below=1e-12, control="ties ranked in their order")
def _() -> tuple[float, float]:
    a, b = (torch.randint(4, (5, 9), dtype=F64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    truth = torch.tensor([float(spearmanr(x, y).statistic) for x, y in zip(a, b, strict=True)], dtype=F64)
    in_order = rank_correlation(*(x.argsort(dim=-1, stable=True).argsort(-1).to(F64) for x in (a, b)))
    return naive.gap(rank_correlation(a, b), truth), naive.gap(in_order, truth)


class Adder(nn.Module):
    """Class token, ten tokens, three layers of two heads: the sum of two specials (0 .. 3) among distractors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place, self.out = nn.Embedding(21, 32), nn.Parameter(0.02 * torch.randn(11, 32)), nn.Linear(32, 7)
        self.blocks = nn.ModuleList(Block(32, Attention(32, 2, causal=False), 64, norm="layer") for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(F.pad(ids, (1, 0), value=20)) + self.place
        for block in self.blocks:
            x = block(x)
        return self.out(x[:, 0])


def drawn(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, label, which tokens are special)."""
    ids = torch.randint(4, 20, (count, 10), generator=generator)
    at = torch.rand(count, 10, generator=generator).argsort(-1)[:, :2]
    values = torch.randint(4, (count, 2), generator=generator)
    return ids.scatter(1, at, values), values.sum(-1), torch.zeros(count, 10).scatter(1, at, 1.0).bool()


@check(
    "rollout-and-flow",
    "trained reader of two specials among ten tokens: AUC of specials against distractors, the lower of rollout's and flow's",
    above=0.95,
    control="the same model untrained",
)
def _() -> tuple[float, float]:
    model = Adder()
    ids, label, special = drawn(25, torch.Generator().manual_seed(100))

    def auc() -> float:
        with torch.no_grad(), taps.read(model, "weights") as seen:
            model(ids)
        weights = list(seen.stack("weights").double())
        found = []
        for x in (rollout(weights)[:, 0, 1:], flow(weights, queries=[0])[:, 0, 1:]):
            pairs = [(x[n][special[n]][:, None] > x[n][~special[n]]).double().mean() for n in range(len(x))]
            found.append(float(torch.stack(pairs).mean()))
        return min(found)

    untrained = auc()
    fit(model, lambda generator: drawn(64, generator), lambda batch: F.cross_entropy(model(batch[0]), batch[1]), 400, lr=3e-3)
    right = float((model(ids).argmax(-1) == label).double().mean())
    return auc() if right >= 0.9 else 0.0, untrained
