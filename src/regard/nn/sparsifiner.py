"""Sparsifiner: a low-rank predictor says which tokens each token attends to (Wei et al., 2023).

c = softmax(scale (q W_q) (P_down^T k W_k)^T);  A_hat = c |P_up|^T;  row i keeps its ceil(keep N) largest A_hat; the class token all
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog.registry import register
from ..engine import attend
from ..errors import RegardError


@register("sparsifiner", kind="module")
class SparsifinerAttention(nn.Module):
    """x (B, N, dim), the class token first -> (B, N, dim). After a pass `mask` (B, H, N, N) and `estimate` (B, H, N - 1, N) hold the prediction.

    tokens: N. rank: r of the predictor (None: N / 8). keep: share of keys a row keeps. basis_threshold, coefficient_threshold: smaller entries
    are zero, which makes the estimate a product of sparse matrices. scale: of the predictor (None: (head_dim / 2)^-0.5). exclude_class: whether the
    class token's row is full. sparse=False runs dense attention, as in the phase that trains the predictor (`reconstruction`).
    """

    mask: Tensor
    estimate: Tensor

    def __init__(
        self, dim: int, heads: int, tokens: int, *, rank: int | None = None, keep: float = 0.25, basis_threshold: float = 0.0,
        coefficient_threshold: float = 0.0, scale: float | None = None, exclude_class: bool = True,
    ):  # fmt: skip
        super().__init__()
        if not 0 < keep <= 1:
            raise RegardError(f"keep={keep}; expected a share in (0, 1]")
        width = dim // heads
        self.heads, self.keep, self.exclude_class = heads, keep, exclude_class
        self.basis_threshold, self.coefficient_threshold, self.scale = basis_threshold, coefficient_threshold, scale or (width / 2) ** -0.5
        rank = rank or max(1, tokens // 8)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.reduce_q, self.reduce_k = (nn.Linear(width, max(1, width // 2), False) for _ in range(2))  # shared by the heads
        self.down, self.up = (nn.Parameter(torch.randn(tokens, rank) * tokens**-0.5) for _ in range(2))
        self.sparse = True

    def predict(self, q: Tensor, k: Tensor, thresholds: bool = True) -> Tensor:
        """The estimate (B, H, N - 1 or N, N) of the attention rows; without thresholds and |.| of P_up while it is being trained."""
        rows = q[..., 1:, :] if self.exclude_class else q
        small = self.reduce_k(k).transpose(-1, -2) @ self.down  # (B, H, d, r)
        c = (self.scale * self.reduce_q(rows) @ small).softmax(-1)
        if not thresholds:
            return c @ self.up.T
        basis = self.up.abs().T
        basis = basis.masked_fill(basis <= self.basis_threshold, 0.0)
        return c.masked_fill(c < self.coefficient_threshold, 0.0) @ basis

    def connectivity(self, estimate: Tensor) -> Tensor:
        """(B, H, N, N) bool: each row's ceil(keep N) largest; the class token's row is full."""
        count = math.ceil(self.keep * estimate.shape[-1])
        chosen = torch.zeros_like(estimate, dtype=torch.bool).scatter_(-1, estimate.detach().topk(count, -1).indices, True)
        return F.pad(chosen, (0, 0, 1, 0), value=True) if self.exclude_class else chosen

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.estimate = self.predict(q, k)
        self.mask = self.connectivity(self.estimate)
        o = attend(q, k, v, mask=self.mask) if self.sparse else attend(q, k, v)
        return self.out(o.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def reconstruction(self, q: Tensor, k: Tensor, teacher: Tensor) -> Tensor:
        """Sum of squared differences of the estimate (no thresholds) to the teacher's rows (B, H, N - 1 or N, N), a sample."""
        return (self.predict(q, k, thresholds=False) - teacher).square().sum() / q.shape[0]


def distillation(student: Tensor, teacher: Tensor, tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    """KL(student || teacher) of logits plus the mean squared difference of the last layer's tokens."""
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="batchmean") + F.mse_loss(
        tokens, teacher_tokens
    )


def prune_tokens(x: Tensor, attention: Tensor, keep: float) -> Tensor:
    """The class token and the ceil(keep (N - 1)) tokens it looks at most: x (B, N, C), attention (B, H, N, N) -> (B, n, C), in order."""
    scores = attention[:, :, 0, 1:].mean(1)
    places = scores.topk(math.ceil(keep * scores.shape[-1]), -1).indices.sort(-1).values + 1
    places = F.pad(places, (1, 0))
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def mhsa_flops(tokens: int, dim: int, keep: float | None, rank: int | None = None, active: float = 1.0) -> float:
    """Of one layer's products over tokens: dense 2 N^2 d; sparse: predictor N r d / 2 twice and its product (share `active`), 2 k N d kept."""
    if keep is None:
        return 2 * 2 * tokens**2 * dim
    rank = rank or tokens // 8
    return 2 * (2 * tokens * rank * dim / 2 + active * tokens**2 * rank + 2 * math.ceil(keep * tokens) * tokens * dim)
