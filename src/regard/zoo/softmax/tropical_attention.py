"""Tropical attention: scores, weights and sums in the max-plus semiring (id 0; Hashemi et al., 2025).

u = log(1 + relu(x)) (- lambda),  q_i = max_j(u_j + W_ij),  s_ij = -(max_c(q_ic - k_jc) - min_c(q_ic - k_jc)),
c_i = max_j(s_ij + v_j),  y = W_out expm1(c)        causal or masked pairs have s = -inf
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes

ROOM = 1 << 22  # entries of the difference tensor that are formed at once


class MaxPlus(torch.autograd.Function):
    """max_k(a_ik + b_kj), a block of rows at a time; the gradient goes to the arg max alone."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        rows = max(1, ROOM // max(1, a.shape[:-2].numel() * b.shape[-2] * b.shape[-1]))
        found = [(part.unsqueeze(-1) + b.unsqueeze(-3)).max(-2) for part in a.split(rows, -2)]
        best = torch.cat([each.indices for each in found], -2)
        ctx.save_for_backward(best)
        ctx.inner = b.shape[-2]  # type: ignore[attr-defined]
        return torch.cat([each.values for each in found], -2)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (best,) = ctx.saved_tensors  # type: ignore[attr-defined]
        inner = ctx.inner  # type: ignore[attr-defined]
        da = grads[0].new_zeros(*best.shape[:-1], inner).scatter_add_(-1, best, grads[0])
        db = grads[0].new_zeros(*best.shape[:-2], inner, best.shape[-1]).scatter_add_(-2, best, grads[0])
        return da, db


def maxplus_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (..., S, D), b (..., D, E) -> (..., S, E): max_k(a_ik + b_kj), with the sub-gradient through the arg max."""
    if a.shape[-1] != b.shape[-2]:
        raise RegardError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected (..., S, D) and (..., D, E)")
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return MaxPlus.apply(a.expand(*lead, *a.shape[-2:]), b.expand(*lead, *b.shape[-2:]))  # type: ignore[no-any-return, no-untyped-call]


class HilbertScores(torch.autograd.Function):
    """-(max_c(q_ic - k_jc) - min_c(q_ic - k_jc)), a block of queries at a time."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, k: Tensor) -> Tensor:
        rows = max(1, ROOM // max(1, k.numel()))
        scores, places = [], []
        for part in q.split(rows, -2):
            gap = part.unsqueeze(-2) - k.unsqueeze(-3)
            high, low = gap.max(-1), gap.min(-1)
            scores.append(low.values - high.values)
            places.append(torch.stack((high.indices, low.indices)))
        ctx.save_for_backward(torch.cat(places, -2))
        ctx.channels = q.shape[-1]  # type: ignore[attr-defined]
        return torch.cat(scores, -2)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        ((high, low),) = ctx.saved_tensors  # type: ignore[attr-defined]
        (g,), d = grads, ctx.channels  # type: ignore[attr-defined]
        dq = g.new_zeros(*g.shape[:-1], d).scatter_add_(-1, low, g).scatter_add_(-1, high, -g)
        turned = g.transpose(-1, -2)
        dk = g.new_zeros(*turned.shape[:-1], d)
        dk.scatter_add_(-1, low.transpose(-1, -2), -turned).scatter_add_(-1, high.transpose(-1, -2), turned)
        return dq, dk


def hilbert_scores(q: Tensor, k: Tensor, symmetric: bool = True) -> Tensor:
    """Minus the projective distance of q (..., S, D) and k (..., T, D): (..., S, T), unchanged by q + c. symmetric=False:
    -(sum_c(q_ic - k_jc) - D min_c(q_ic - k_jc))."""
    if symmetric:
        return HilbertScores.apply(q, k)  # type: ignore[no-any-return, no-untyped-call]
    total = q.sum(-1).unsqueeze(-1) - k.sum(-1).unsqueeze(-2)
    least = -maxplus_matmul(-q, k.transpose(-1, -2))
    return q.shape[-1] * least - total


class TropicalLinear(nn.Module):
    """y_i = max_j(x_j + W_ij): x (..., inputs) -> (..., outputs); W starts at N(0, 1)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return maxplus_matmul(x.flatten(0, -2), self.weight.T).unflatten(0, x.shape[:-1])


@register("tropical-attention", kind="module")
class TropicalAttention(nn.Module):
    """x (B, S, dim) -> (out (B, S, dim), scores (B, H, S, S)). There are no ordinary q, k and v projections.

    tropical_proj: project in max-plus, by matrices that all heads share. tropical_norm: subtract a learned lambda (dim,), from 1.
    symmetric: Hilbert's metric, or its one-sided form. causal, mask (bool, broadcastable to (B, H, S, S)): hidden pairs get -inf.
    """

    def __init__(
        self, dim: int, heads: int, tropical_proj: bool = True, tropical_norm: bool = False, symmetric: bool = True, causal: bool = False
    ):
        super().__init__()
        self.dim = dim
        if dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads, self.symmetric, self.causal = heads, symmetric, causal
        width = dim // heads
        self.shift = nn.Parameter(torch.ones(1, 1, dim)) if tropical_norm else None
        self.q, self.k, self.v = (TropicalLinear(width, width) if tropical_proj else nn.Identity() for _ in range(3))
        self.out = nn.Linear(dim, dim, bias=False)

    @takes(x="batch length dim")
    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = torch.log1p(torch.relu(x))
        u = u if self.shift is None else u - self.shift
        u = u.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = hilbert_scores(self.q(u), self.k(u), self.symmetric)
        if self.causal:
            past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
            mask = past if mask is None else mask & past
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        c = maxplus_matmul(scores, self.v(u)).transpose(1, 2).flatten(-2)
        return self.out(torch.expm1(c)), scores


class TropicalBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a layer of a tropical transformer's encoder."""

    def __init__(self, dim: int, heads: int, hidden: int, **options: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = TropicalAttention(dim, heads, **options)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)[0]
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
