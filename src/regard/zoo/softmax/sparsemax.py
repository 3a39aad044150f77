"""Sparsemax: the projection of scores onto the simplex, with exact zeros (id 5; Martins & Astudillo, 2016).

p_i = argmin_{p in simplex} |p - s_i|^2 = relu(s_i - tau_i),   tau_i such that the row sums to one

Not built: the demonstration on entailment or retrieval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import RowLocal, Weighted
from regard.catalog.registry import register


def above(s: Tensor, c: Tensor) -> Tensor:
    return torch.relu(s - c)


@register("sparsemax")
def sparsemax() -> Weighted:
    """alpha-entmax at alpha = 2."""
    return Weighted(normalizer=RowLocal(above, shift="root", floor=1.0))


class SparsemaxFunction(torch.autograd.Function):
    """Exact by sorting; backward is s * (v - mean of v over the support)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:
        ranked = z.sort(-1, descending=True).values
        sums = ranked.cumsum(-1) - 1
        rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        size = (rank * ranked > sums).sum(-1, keepdim=True).clamp_min(1)  # a row of -inf has none
        p = torch.where(z > float("-inf"), (z - sums.gather(-1, size - 1) / size).clamp_min(0), 0.0)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        support = (ctx.saved_tensors[0] > 0).to(grads[0].dtype)  # type: ignore[attr-defined]
        mean = (grads[0] * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_min(1)
        return support * (grads[0] - mean)


def sparsemax_weights(z: Tensor, dim: int = -1) -> Tensor:
    """The map itself along `dim`; entries of -inf get weight 0, and a row of nothing else is zero."""
    return SparsemaxFunction.apply(z.movedim(dim, -1)).movedim(-1, dim)  # type: ignore[no-any-return, no-untyped-call]


def sparsemax_loss(z: Tensor, target: Tensor) -> Tensor:
    """Loss (...,) of logits z (..., C): -q.z + 1/2 sum_{p>0} (z^2 - tau^2) + 1/2 |q|^2, gradient sparsemax(z) - q.

    target: class numbers (...,), or a distribution q (..., C) over labels. Zero iff the margin is at least 1.
    """
    q = torch.nn.functional.one_hot(target, z.shape[-1]).to(z.dtype) if not target.is_floating_point() else target
    p = sparsemax_weights(z)
    on = p > 0
    tau = ((z * on).sum(-1, keepdim=True) - 1) / on.sum(-1, keepdim=True)
    return (-q * z).sum(-1) + 0.5 * torch.where(on, z.square() - tau.square(), 0.0).sum(-1) + 0.5 * q.square().sum(-1)
