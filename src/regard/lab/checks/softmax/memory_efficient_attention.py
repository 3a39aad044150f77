"""Checks of memory-efficient-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.zoo.softmax.memory_efficient_attention import LazySoftmax, memory_efficient_attention


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
    "one query over streamed keys equals the softmax, at logits of +-1e3: share of entries off by more than 1e-12, or no numbers",
    below=0,
    control="without the running maximum",
)
def _() -> tuple[float, float]:
    q, k, v = torch.randn(8, dtype=F64) * 300, torch.randn(50, 8, dtype=F64), torch.randn(50, 3, dtype=F64)
    lazy = LazySoftmax(q)
    for key, value in zip(k, v, strict=True):
        lazy.update(key, value)
    truth = naive.softmax(k @ q / math.sqrt(8)) @ v
    e = torch.exp((k @ q / math.sqrt(8)).float())

    def off(out: Tensor) -> float:
        return 1 - float(((out.double() - truth).abs() <= 1e-12).double().mean())

    return off(lazy.value()), off((e @ v.float()) / e.sum())
