"""Checks of mqa."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.systems.mqa import pool_heads


def tied() -> tuple[Attention, Attention, Tensor]:
    """A multi-query layer, and a multi-head one whose heads' K and V are copies of its."""
    shared, full = Attention(16, 4, "mqa").double(), Attention(16, 4, "softmax").double()
    with torch.no_grad():
        full.q.weight.copy_(shared.q.weight)
        full.out.weight.copy_(shared.out.weight)
        full.k.weight.copy_(shared.k.weight.repeat(4, 1))
        full.v.weight.copy_(shared.v.weight.repeat(4, 1))
    return shared, full, torch.randn(2, 21, 16, dtype=F64)


@check(
    "mqa",
    "equals multi-head attention with tied K and V; the shared gradient is the sum of the tied ones",
    below=1e-12,
    control="the mean of the tied ones",
)
def _() -> tuple[float, float]:
    shared, full, x = tied()
    a, c = shared(x), full(x)
    a.square().sum().backward()
    c.square().sum().backward()
    assert shared.k.weight.grad is not None and full.k.weight.grad is not None
    parts = full.k.weight.grad.unflatten(0, (4, -1))
    return max(naive.gap(a, c), naive.gap(shared.k.weight.grad, parts.sum(0))), naive.gap(shared.k.weight.grad, parts.mean(0))


@check("mqa", "incremental decoding equals the batched form", below=1e-10, control="positions forgotten: each token alone")
def _() -> tuple[float, float]:
    shared, _, x = tied()
    whole, state, outs, alone = shared(x), None, [], []
    for t in range(21):
        y, state = shared.step(x[:, t : t + 1], state)
        outs.append(y)
        alone.append(shared.step(x[:, t : t + 1], None)[0])
    return naive.gap(torch.cat(outs, 1), whole), naive.gap(torch.cat(alone, 1), whole)


@check("mqa", "cache elements a sequence are L (k + v), whatever the number of heads: excess", below=0.0, control="the multi-head cache")
def _() -> tuple[float, float]:
    shared, full, x = tied()

    def excess(layer: Attention) -> float:
        _, state = layer.step(x)
        return state.bytes / 8 / 2 - 21 * (4 + 4)

    return excess(shared), excess(full)


@check("mqa", "kv_heads = 2 of 4 equals explicitly repeated heads", below=1e-12, control="heads repeated in the other order")
def _() -> tuple[float, float]:
    q, k, v = qkv(21, heads=4, kv=2)
    out = attend(q, k, v, "softmax", mask=Causal())
    rows = [attend(q, x.repeat_interleave(2, 1), y.repeat_interleave(2, 1), "softmax", mask=Causal()) for x, y in ((k, v),)]
    return naive.gap(out, rows[0]), naive.gap(out, attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), "softmax", mask=Causal()))


@check("mqa", "conversion: pooled projections are the means over the heads of each group", below=1e-15, control="each group's first head")
def _() -> tuple[float, float]:
    shared, full, _ = tied()
    untied = Attention(16, 4, "softmax").double().k.weight
    heads = [untied[4 * h : 4 * h + 4] for h in range(4)]
    means = torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
    own = max(naive.gap(pool_heads(untied, 4, 2), means), naive.gap(pool_heads(full.k.weight, 4, 1), shared.k.weight))
    return own, naive.gap(torch.cat([heads[0], heads[2]]), means)
