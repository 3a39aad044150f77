"""Checks of sparsifiner."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.sparsifiner import SparsifinerAttention


@check(
    "sparsifiner",
    "keep = 1 is dense attention; 0.25 has ceil(N / 4) keys a row (class row all) and equals dense masked softmax",
    below=1e-12,
    control="keep = 0.25 against dense",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 65, 32, dtype=F64)
    layer = SparsifinerAttention(32, 4, 65, keep=1.0).double()
    q, k, v = layer.split(x)
    dense = layer.out(attend(q, k, v).transpose(1, 2).flatten(-2))
    own = naive.gap(layer(x), dense)
    layer.keep = 0.25
    out = layer(x)
    counts = layer.mask.sum(-1)
    wrong = float((counts[..., 1:] != 17).sum() + (counts[..., 0] != 65).sum())
    truth = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~layer.mask, -math.inf).softmax(-1) @ v
    return max(own, naive.gap(out, layer.out(truth.transpose(1, 2).flatten(-2)))) + wrong, naive.gap(out, dense)


@check(
    "sparsifiner",
    "a predictor trained by reconstruction: mass of its top 17 over the teacher's own, new samples",
    above=0.95,
    control="one fixed mask for all inputs",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    directions, place = torch.randn(6, 16), torch.randn(65, 16)
    mixtures = torch.zeros(6, 65)
    for row in mixtures:
        row[torch.randperm(65)[:12]] = 1 / 12

    def sample(count: int) -> tuple[Tensor, Tensor]:
        content = torch.randn(count, 65, 16)
        weights = (4 * content @ directions.T / 4).softmax(-1)
        return torch.cat((content, place.expand(count, -1, -1)), -1)[:, None], (0.95 * weights @ mixtures + 0.05 / 65)[:, None]

    layer = SparsifinerAttention(32, 1, 65, rank=8, exclude_class=False)
    parameters = [layer.reduce_q.weight, layer.reduce_k.weight, layer.down, layer.up]
    step = torch.optim.Adam(parameters, lr=3e-2)
    for _ in range(600):
        x, teacher = sample(32)
        loss = layer.reconstruction(x, x, teacher)
        step.zero_grad()
        loss.backward()
        step.step()
    x, teacher = sample(64)
    oracle = teacher.topk(17, -1).values.sum()
    chosen = layer.predict(x, x).topk(17, -1).indices
    fixed = sample(256)[1].mean(0, keepdim=True).topk(17, -1).indices.expand_as(chosen)
    return tuple(float(teacher.gather(-1, at).sum() / oracle) for at in (chosen, fixed))  # type: ignore[return-value]
