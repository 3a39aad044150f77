"""Tokens that are alike side by side: Lloyd's k-means of (..., L, D), started from tokens far from one another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError
from .permute import Permutation, taken


def between(x: Tensor, y: Tensor) -> Tensor:
    """Distances (..., N, M), without the rounding of products of whole matrices."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def farthest(x: Tensor, count: int) -> Tensor:
    """Token 0, then again and again the one farthest from those taken: (..., count)."""
    at = torch.zeros(*x.shape[:-2], 1, dtype=torch.long, device=x.device)
    chosen, near = [at], between(x, taken(x, at))[..., 0]
    for _ in range(count - 1):
        at = near.argmax(-1, keepdim=True)
        chosen.append(at)
        near = torch.minimum(near, between(x, taken(x, at))[..., 0])
    return torch.cat(chosen, -1)


@torch.no_grad()
def k_means(x: Tensor, count: int, iters: int) -> Tensor:
    """(..., L): the cluster of each token after `iters` rounds of nearest centre and mean; an empty cluster keeps its centre."""
    centres = taken(x, farthest(x, count))
    label = between(x, centres).argmin(-1)
    for _ in range(iters):
        member = torch.nn.functional.one_hot(label, count).to(x.dtype)
        mass = member.sum(-2)[..., None]
        centres = torch.where(mass > 0, member.mT @ x / mass.clamp_min(1), centres)
        label = between(x, centres).argmin(-1)
    return label


def by_cluster(x: Tensor, count: int, iters: int = 10, extra: int = 0) -> Permutation:
    """Tokens of x (..., L, D), such as keys, cluster after cluster, in their old order inside each; the last `extra` tokens stay where they are."""
    length = x.shape[-2] - extra
    if not 1 <= count <= length or iters < 0 or extra < 0:
        raise RegardError(
            f"count={count}, iters={iters}, extra={extra} for {x.shape[-2]} tokens: expected 1 to {length} clusters, none negative"
        )
    seen = x[..., :length, :].detach().to(torch.promote_types(x.dtype, torch.float32))
    order = k_means(seen, count, iters).argsort(dim=-1, stable=True)
    rest = torch.arange(length, length + extra, device=x.device).expand(*order.shape[:-1], extra)
    return Permutation(torch.cat((order, rest), -1))
