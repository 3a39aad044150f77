"""Weights of low rank: the best factors in the plain, a weighed or a whitened norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError


def factorised(weight: Tensor, rank: int, fisher: Tensor | None = None, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """W (in, out) ~ left (in, r) @ right (r, out), the best of its rank; whole factors in the weight's dtype.

    Plain: in the Frobenius norm. fisher (in,): rows weighed by these, by their square roots (FWSVD). gram (in, in): X^T X of inputs, for the
    least error of X W (whitened SVD).
    """
    if not 1 <= rank <= min(weight.shape) or (fisher is not None and gram is not None):
        raise RegardError(f"rank={rank} of a weight {tuple(weight.shape)}: expected 1 to {min(weight.shape)}, and fisher or gram, not both")
    w = weight.double()
    if gram is not None:
        root = torch.linalg.cholesky(
            gram.double() + 1e-12 * gram.diagonal().mean() * torch.eye(len(gram), dtype=w.dtype, device=w.device)
        ).T
        u, s, v = torch.linalg.svd(root @ w, full_matrices=False)
        left = torch.linalg.solve_triangular(root, u[:, :rank] * s[:rank], upper=True)
    else:
        d = torch.ones_like(w[:, :1]) if fisher is None else fisher.double()[:, None].sqrt().clamp_min(1e-12)
        u, s, v = torch.linalg.svd(d * w, full_matrices=False)
        left = u[:, :rank] * s[:rank] / d
    return left.to(weight.dtype), v[:rank].to(weight.dtype)
