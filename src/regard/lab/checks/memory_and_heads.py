"""Checks of the rows about memory and heads: memory-efficient attention, multi-query attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...algebra import Causal
from ...engine import attend
from ...mechanisms.weighted.memory_efficient import LazySoftmax, memory_efficient_attention
from ...mechanisms.weighted.mqa import pool_heads
from ...nn import Attention
from .. import naive
from ..memory import largest_tensor
from ..verification import check
from .selected import qkv

F64 = torch.float64


@check(
    "memory-efficient-attention",
    "equals softmax attention with bias, causal, n = 203, m = 187, chunks 64/50, logits of +-1e4, a masked row; with gradients",
    below=1e-10,
    control="bias left out",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for size in (1.0, 1e4):
        q, k, v = (x.requires_grad_() for x in qkv(203, m=187))
        bias = (size * torch.randn(1, 2, 203, 187, dtype=F64)).requires_grad_()
        i, j = torch.arange(203)[:, None] - 16, torch.arange(187)
        seen = (j <= i) & (i != 90)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i != 90)

        out = memory_efficient_attention(q, k, v, mask, bias, q_chunk=64, k_chunk=50)
        s = (q @ k.transpose(-1, -2) / math.sqrt(8) + bias).masked_fill(~seen, -1e30)
        truth = torch.where(seen.any(-1, keepdim=True), s.softmax(-1) * seen, 0.0) @ v
        leaves = (q, k, v, bias)
        seed = torch.randn_like(truth)
        grads = [torch.autograd.grad((o * seed).sum(), leaves) for o in (out, truth)]
        scale = max(1.0, *[float(g.abs().max()) for g in grads[1]])
        own = max(own, naive.gap(out, truth), *[naive.gap(a, c) / scale for a, c in zip(*grads, strict=True)])
        other = max(other, naive.gap(memory_efficient_attention(q, k, v, mask, q_chunk=64, k_chunk=50), truth))
    return own, other


@check(
    "memory-efficient-attention",
    "largest tensor at n = 8192, forward and backward, over 2 q_chunk k_chunk (naive: n^2)",
    below=1.0,
    control="naive attention",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 8192, 16, requires_grad=True) for _ in range(3))
    room = 2 * 512 * 1024

    def own() -> None:
        memory_efficient_attention(q, k, v, q_chunk=512, k_chunk=1024).sum().backward()

    def written_out() -> None:
        ((q @ k.transpose(-1, -2)).softmax(-1) @ v).detach()

    return largest_tensor(own) / room, largest_tensor(written_out) / room


@check(
    "memory-efficient-attention",
    "one query over streamed keys equals the softmax, at logits of +-1e3",
    below=1e-12,
    control="without the running maximum",
)
def _() -> tuple[float, float]:
    q, k, v = torch.randn(8, dtype=F64) * 300, torch.randn(50, 8, dtype=F64), torch.randn(50, 3, dtype=F64)
    lazy = LazySoftmax(q)
    for key, value in zip(k, v, strict=True):
        lazy.update(key, value)
    truth = naive.softmax(k @ q / math.sqrt(8)) @ v
    e = torch.exp((k @ q / math.sqrt(8)).float())
    return naive.gap(lazy.value(), truth), naive.gap(((e @ v.float()) / e.sum()).double(), truth)


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
