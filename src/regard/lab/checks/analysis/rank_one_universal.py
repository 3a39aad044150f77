"""Checks of rank-one-universal."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.analysis.rank_one_universal import (
    OneLayer,
    RankOneAttention,
    boltz,
    collisions,
    contextual_mapping,
    fit_sequences,
    separation_bound,
    telling,
)


@check(
    "rank-one-universal",
    "all triples of 5 values 4 ln 3 + 3.05 apart: least difference of boltz over (ln 3)^2 e^{-2r}",
    above=1.0,
    control="of the greatest entries",
)
def _() -> tuple[float, float]:
    values = (4 * math.log(3) + 3.05) * (torch.arange(5, dtype=F64) - 2)
    sets = [values[list(chosen)] for chosen in itertools.combinations(range(5), 3)]
    bound = separation_bound(3, float(values.max()))
    by_hand = [sum(float(a) * math.exp(float(a)) for a in s) / sum(math.exp(float(a)) for a in s) for s in sets]
    found = [float(boltz(s)) for s in sets]
    exact = max(abs(a - b) for a, b in zip(found, by_hand, strict=True)) < 1e-12
    own = min(abs(a - b) for a, b in itertools.combinations(found, 2)) / bound
    return own if exact else 0.0, min(abs(float(a.max() - b.max())) for a, b in itertools.combinations(sets, 2)) / bound


def sequences(scale: float, hard: bool = False) -> tuple[int, float, float]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = 2 * F.normalize(torch.randn(6, 8, generator=generator, dtype=F64), dim=1)
    ids = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(30)])
    return collisions(contextual_mapping(vocabulary, scale, hard), vocabulary, ids)


@check(
    "rank-one-universal",
    "30 sequences of 4 of 6 tokens, scales 1 and 2: different (token, context) pairs with one output",
    below=0,
    control="hardmax",
)
def _() -> tuple[float, float]:
    runs = [sequences(scale) for scale in (1.0, 2.0)]
    apart = all(least > 1e-6 and equal < 1e-12 for _, least, equal in runs)
    return sum(run[0] for run in runs) if apart else 1, sequences(1.0, hard=True)[0]


@check(
    "rank-one-universal", "the layer, soft and hard, by loops; its four matrices have rank one", below=1e-12, control="softmax over queries"
)
def _() -> tuple[float, float]:
    gaps, other = [], 0.0
    for hard in (False, True):
        layer = RankOneAttention(5, torch.randn(5, dtype=F64), 1.7, out=torch.randn(5, dtype=F64), hard=hard).to(F64)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.3 * torch.randn(5, dtype=F64))
        x = torch.randn(2, 5, 4, dtype=F64)
        k, q, v, o = (torch.outer(layer.left[n], layer.right[n]).detach() for n in "kqvo")
        truth, across = x.clone(), x.clone()
        for b in range(2):
            s = torch.tensor([[float((k @ x[b, :, i]) @ (q @ x[b, :, j])) for j in range(4)] for i in range(4)], dtype=F64)
            for j in range(4):
                row = torch.eye(4, dtype=F64)[int(s[:, j].argmax())] if hard else s[:, j].softmax(0)
                for i in range(4):
                    truth[b, :, j] += o @ (v @ x[b, :, i]) * row[i]
                    across[b, :, j] += o @ (v @ x[b, :, i]) * s.softmax(1)[i, j]
        gaps.append(naive.gap(layer(x), truth))
        other = naive.gap(layer(x), across)
        gaps += [float(torch.linalg.svdvals(m)[1]) for m in (k, q, v, o)]
    vocabulary = torch.randn(7, 6, dtype=F64)
    d = telling(vocabulary)
    least = min(float(abs(d @ (a - b)) / (a - b).norm()) for a, b in itertools.combinations(vocabulary, 2))
    return max(gaps) if least >= math.sqrt(8 / (math.pi * 6)) / 49 and abs(float(d.norm()) - 1) < 1e-12 else 1.0, other


@check(
    "rank-one-universal",
    "16 sequences of 4 tokens with labels that hang on the context: those right after training",
    above=0.97,
    control="without attention",
)
def _() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = F.normalize(torch.randn(6, 8, generator=generator), dim=1)
    ids = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(16)])
    keys, at = ids.sort(-1).values.unique(dim=0, return_inverse=True)
    labels = torch.randint(3, (len(keys), 6), generator=generator)[at].gather(1, ids)

    def right(attention: bool) -> float:
        torch.manual_seed(0)
        found = fit_sequences(OneLayer(8, 16, 3, 128, attention), vocabulary[ids].transpose(1, 2), labels, steps=600).right
        assert found is not None
        return found

    return right(True), right(False)


@check(
    "rank-one-universal",
    "a permutation-equivariant function, x_j max_i x_i: error over variance on its samples",
    below=0.05,
    control="without attention",
)
def _() -> tuple[float, float]:
    x: Tensor = 2 * torch.rand(64, 1, 5, generator=torch.Generator().manual_seed(1)) - 1
    y = x * x.amax(2, keepdim=True)

    def error(attention: bool) -> float:
        torch.manual_seed(1)
        model = OneLayer(1, 16, 1, 64, attention)
        found = fit_sequences(model, x, y, steps=700, lr=5e-3).error
        order = torch.tensor([3, 1, 4, 0, 2])
        assert found is not None and naive.gap(model(x[:, :, order]), model(x)[:, :, order]) < 1e-5
        return found

    return error(True), error(False)
