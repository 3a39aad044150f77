"""Length-scaled softplus attention with re-weighting (id 9; Gao & Spratling, 2025).

A_ij = softplus(log D log n_i cos(q_i, k_j)) / sum_j,   p_ij = R_ij / sum_j R_ij,   R_ij = relu(n_i A_ij - O_i)^p,   O_i = 1 if n_i > 3 else 0
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Dot, RowLocal, RowWise, Weighted, bind, row_max, row_sum
from regard.catalog.registry import register
from regard.errors import RegardError


def log_lengths(n: Tensor, head_dim: int) -> Tensor:
    return math.log(head_dim) * torch.log(n.clamp_min(1))


def at_least(total: Tensor, eps: float) -> Tensor:
    return total + eps


def reweighted(weights: Tensor, seen: Tensor, n: Tensor, p: float, eps: float) -> Tensor:
    """Keep what lies above the uniform level 1 / n, sharpen by the power p, and normalise again."""
    above = torch.where(seen, torch.relu(n * weights - (n > 3).to(weights.dtype)), 0.0)
    top = row_max(above, seen).detach()
    top = torch.where(top > 0, top, 1.0)
    # Powers are taken of shares of the maximum, so p = 15 overflows nowhere; eps is scaled alike, which changes no weight.
    guard = eps * torch.exp((-p * top.log()).clamp_max(80.0))
    shares = above / top
    powers = whole_power(shares, int(p)) if p == int(p) else torch.where(above > 0, torch.where(above > 0, shares, 1.0) ** p, 0.0)
    return powers / (row_sum(powers, seen) + guard)


def whole_power(x: Tensor, p: int) -> Tensor:
    """x ** p by squaring: a few products are many times faster than `pow`."""
    out: Tensor | None = None
    while p:
        if p & 1:
            out = x if out is None else out * x
        x, p = (x * x, p >> 1) if p > 1 else (x, 0)
    assert out is not None
    return out


def softplus_then_reweighted(s: Tensor, seen: Tensor, n: Tensor, p: float, eps: float) -> Tensor:
    first = F.softplus(s)
    return reweighted(first / (row_sum(first, seen) + eps), seen, n, p, eps)


@register("lssar")
def lssar(p: float = 15.0, reweight: bool = True, eps: float = 1e-8) -> Weighted:
    """p: the power of the re-weighting (3 is best for training lengths of 1k, 15 for 8k and more). reweight False: LSSA, the first stage."""
    if p <= 0:
        raise RegardError(f"p={p}: expected a positive power")
    score = Dot(log_lengths, power=0.0, unit=True)
    if not reweight:
        return Weighted(score=score, normalizer=RowLocal(F.softplus, F.softplus, bind(at_least, eps=eps)))
    return Weighted(score=score, normalizer=RowWise(bind(softplus_then_reweighted, p=p, eps=eps)))


def reweight(weights: Tensor, p: float = 15.0, eps: float = 1e-8, seen: Tensor | None = None) -> Tensor:
    """The second stage on any non-negative weights (..., Lq, Lk) whose rows sum to one; seen: bool, which pairs are visible (None: all)."""
    seen = torch.ones_like(weights, dtype=torch.bool) if seen is None else seen.expand_as(weights)
    return torch.where(seen, reweighted(weights, seen, seen.sum(-1, keepdim=True).to(weights.dtype), p, eps), 0.0)
