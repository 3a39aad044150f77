"""Scores from a few directions of queries and keys, and bounds on what leaving the others out changes.

S_r = (Q V_q) (V_q^T V_k) (K V_k)^T / sqrt(d) over the first r right singular vectors of each: Q_r = Q V_q V_q^T is Q's best rank-r form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError


@dataclass(frozen=True)
class Basis:
    """vectors (..., d, k): orthonormal right singular vectors. sigma (..., k): their singular values, descending."""

    vectors: Tensor
    sigma: Tensor


def svd_basis(x: Tensor, rank: int | None = None) -> Basis:
    """The first `rank` (None: all) right singular vectors of x (..., L, d), in float32 at least; as many as min(L, d) at most."""
    rank = min(x.shape[-2:]) if rank is None else rank
    if rank < 1:
        raise RegardError(f"rank={rank} of x {tuple(x.shape)}: expected 1 or more")
    if not bool(x.isfinite().all()):
        raise RegardError("x holds NaN or infinity; expected finite numbers, which alone have singular values")
    with torch.autocast(x.device.type, enabled=False):
        _, sigma, vh = torch.linalg.svd(x.to(torch.promote_types(x.dtype, torch.float32)), full_matrices=False)
    return Basis(vh[..., :rank, :].mT, sigma[..., :rank])


def warm_basis(x: Tensor, start: Tensor, iterations: int = 2) -> Basis:
    """`iterations` steps of subspace iteration V <- qr(X^T X V) from start (..., d, k), then the k directions within it in order."""
    if iterations < 1 or start.shape[:-1] != x.shape[:-2] + x.shape[-1:]:
        raise RegardError(
            f"iterations={iterations}, start {tuple(start.shape)}: expected 1 or more, and {(*x.shape[:-2], x.shape[-1])} and a rank"
        )
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(start.dtype)
        for _ in range(iterations):
            start = torch.linalg.qr(wide.mT @ (wide @ start))[0]
        _, sigma, vh = torch.linalg.svd(wide @ start, full_matrices=False)
        return Basis(start @ vh.mT, sigma)


def extended(x: Tensor, basis: Basis, rank: int) -> Basis:
    """The basis at another rank: columns are dropped, or those that are missing are found in what the basis leaves of x."""
    have = basis.sigma.shape[-1]
    if rank <= have:
        if rank < 1:
            raise RegardError(f"rank={rank}: expected 1 or more")
        return Basis(basis.vectors[..., :rank], basis.sigma[..., :rank])
    wide = x.to(basis.vectors.dtype)
    rest = wide - (wide @ basis.vectors) @ basis.vectors.mT
    more = svd_basis(rest, min(rank, *x.shape[-2:]) - have)
    return Basis(torch.cat((basis.vectors, more.vectors), -1), torch.cat((basis.sigma, more.sigma), -1))


def factors(q: Tensor, k: Tensor, vq: Tensor, vk: Tensor) -> tuple[Tensor, Tensor]:
    """(..., Lq, r) and (..., Lk, r) whose product is q vq vq^T vk vk^T k^T, in float32 at least."""
    with torch.autocast(q.device.type, enabled=False):
        return q.to(vq.dtype) @ vq @ (vq.mT @ vk), k.to(vk.dtype) @ vk


def spectral_norm(x: Tensor, iterations: int = 3, start: Tensor | None = None) -> Tensor:
    """||x||_2 (...) of x (..., n, d) by power iterations on x^T x, from below. start (..., d): the first vector (None: drawn)."""
    if iterations < 0:
        raise RegardError(f"iterations={iterations}: expected 0 or more")
    v = torch.randn_like(x[..., 0, :]) if start is None else start
    v = F.normalize(v, dim=-1).unsqueeze(-1)
    for _ in range(iterations):
        v = F.normalize(x.mT @ (x @ v), dim=-2)
    return (x @ v).norm(dim=(-2, -1))


def tail(sigma: Tensor, rank: int | Tensor, other: int | Tensor | None = None) -> Tensor:
    """||X_other - X_rank||_F = sqrt(sum of sigma_k^2 between the two ranks), sigma (..., k); ranks: numbers, or tensors that broadcast to (...).

    other None: X itself.
    """
    place = torch.arange(sigma.shape[-1], device=sigma.device)
    a, b = (torch.as_tensor(sigma.shape[-1] if r is None else r, device=sigma.device) for r in (rank, other))
    within = (place >= torch.minimum(a, b)[..., None]) & (place < torch.maximum(a, b)[..., None])
    return (sigma.square() * within).sum(-1).sqrt()


def score_bound(sigma_q: Tensor, sigma_k: Tensor, dim: int, rank: int | Tensor, other: int | Tensor | None = None) -> Tensor:
    """||S_other - S_rank||_F <= (||dQ||_F ||K||_2 + ||Q||_2 ||dK||_F) / sqrt(dim), of all singular values; ranks as for `tail`."""
    return (tail(sigma_q, rank, other) * sigma_k[..., 0] + sigma_q[..., 0] * tail(sigma_k, rank, other)) / dim**0.5


def weight_bound(scores: Tensor) -> Tensor:
    """||dP||_F <= ||dS||_F / 2: softmax is 1/2-Lipschitz."""
    return 0.5 * scores


def output_bound(weights: Tensor, v: Tensor) -> Tensor:
    """||dO||_F <= ||dP||_2 ||V||_F; weights (...): ||dP||_2, or ||dP||_F, which is no less. v (..., L, dv)."""
    return weights * v.norm(dim=(-2, -1))


def energy_ratio(sigma: Tensor, rank: int, eps: float = 1e-8) -> Tensor:
    """sum_{k <= rank} sigma_k^2 / (sum_k sigma_k^2 + eps)."""
    energy = sigma.square()
    return energy[..., :rank].sum(-1) / (energy.sum(-1) + eps)


def score_flops(queries: int, keys: int, rank: int, dim: int) -> int:
    """Of the scores of a head: 2 Lq Lk d at full rank, else 2 (Lq Lk r + (Lq + Lk) d r + Lq r^2), projections included."""
    return 2 * queries * keys * dim if rank >= dim else 2 * (queries * keys * rank + (queries + keys) * dim * rank + queries * rank**2)
