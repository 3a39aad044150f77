"""Flowformer: attention as a flow network that conserves what sources send and sinks receive (id 138; Wu et al., 2022).

I_i = phi(q_i).sum_j phi(k_j), O_j = phi(k_j).sum_i phi(q_i);  I^_i = phi(q_i).sum_j phi(k_j) / O_j, O^_j = phi(k_j).sum_i phi(q_i) / I_i
o_i = sigmoid(I^_i Lq / Lk) phi(q_i) / I_i . sum_j phi(k_j) (Lk softmax_j(O^_j)) v_j^T,   phi = sigmoid
Not built: its tasks of time series and decisions.
"""

import torch
from torch import Tensor

from regard.algebra import JointMap, Recipe, Recurrent, bind
from regard.catalog.registry import register
from regard.errors import RegardError

HIDDEN = -1e30  # finite: a row of nothing but padding has a softmax, which its zero keys then ignore


def flows(q: Tensor, k: Tensor, n: Tensor, real: Tensor | None, eps: float, limit: float) -> tuple[Tensor, Tensor]:
    """phi(q) times its allocation over its inflow, and phi(k) times its competition."""
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    k = k if real is None else k * real
    q = q if real is None or q.shape[-2] != k.shape[-2] else torch.where(real, q, 0.0)

    def met(x: Tensor, y: Tensor) -> Tensor:
        return ((x + eps) * (y.sum(-2, keepdim=True) + eps)).sum(-1, keepdim=True)

    inflow, outflow = 1 / met(q, k), 1 / met(k, q)
    sink, source = met(q, k * outflow), met(k, q * inflow).clamp(-limit, limit)
    source = source if real is None else source.masked_fill(~real, HIDDEN)
    sinks = q.shape[-2] if real is None or q.shape[-2] != k.shape[-2] else n
    return q * inflow * torch.sigmoid(sink * (sinks / n)), k * torch.softmax(source, -2) * n


def causal_flows(
    q: Tensor, k: Tensor, n: Tensor, real: Tensor | None, carry: tuple[Tensor, ...] | None, eps: float, limit: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The same with sums up to each token; `carry` holds the five sums where a stream stopped."""
    if q.shape[-2] != k.shape[-2]:
        raise RegardError(f"{q.shape[-2]} queries but {k.shape[-2]} keys: causal flows need every token's query; expected as many")
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    q, k = (q, k) if real is None else (torch.where(real, q, 0.0), k * real)
    old, new = list(carry) if carry else [], []

    def running(x: Tensor) -> Tensor:
        total = x.cumsum(-2) + (old.pop(0) if old else 0.0)
        new.append(total[..., -1:, :])
        return total

    def met(x: Tensor, past: Tensor) -> Tensor:
        return ((x + eps) * (past + eps)).sum(-1, keepdim=True)

    inflow, outflow = n / met(q, running(k)), n / met(k, running(q))
    sink = met(q, running(k * outflow)) / n
    source = torch.exp((met(k, running(q * inflow)) / n).clamp(-limit, limit))
    source = source if real is None else source * real
    competition = source / running(source).clamp_min(1e-30) * n
    return q * inflow / n * torch.sigmoid(sink), k * competition, tuple(new)


@register("flowformer")
def flowformer(causal: bool = False, eps: float = 1e-6, limit: float = 1.0) -> Recurrent:
    """causal: the form for decoders, with sums up to each token (O_j then reads the queries up to j). limit: bounds on O^ before the
    softmax (10 for reinforcement learning in the released code). Cross-attention with Lq != Lk: causal=False."""
    if limit <= 0:
        raise RegardError(f"limit={limit}; expected a positive number")
    function = bind(causal_flows, eps=eps, limit=limit) if causal else bind(flows, eps=eps, limit=limit)
    return Recurrent(JointMap(function, causal=causal), scaled=False, causal=causal, recipe=Recipe(rope=False))
