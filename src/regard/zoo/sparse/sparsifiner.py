"""Sparsifiner: a low-rank predictor says which tokens each token attends to (Wei et al., 2023).

c = softmax(scale (q W_q) (P_down^T k W_k)^T);  A_hat = c |P_up|^T;  row i keeps its ceil(keep N) largest A_hat; the class token all
Not built: a ViT around the layer, and its schedule of training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra.blocks import top_k
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import Momentary, takes


@register("sparsifiner", kind="module")
class SparsifinerAttention(Momentary):
    """x (B, N, dim), the class token first -> (B, N, dim). After a pass `mask` (B, H, N, N) and `estimate` (B, H, N - 1, N) hold the prediction.

    tokens: N. rank: r of the predictor (None: N / 8). reduction: head_dim over the predictor's width. bias: of the predictor's two maps.
    keep: share of keys a row keeps; or estimate_threshold: keys whose estimate is above it. basis_threshold, coefficient_threshold: smaller
    entries are zero, coefficient_top: so many coefficients of a row are left (0: all), which makes the estimate a product of sparse matrices.
    scale: of the predictor (None: heads^-0.5, as released). exclude_class: whether the class token's row is full. `sparse` = False runs dense
    attention, as in the phase that trains the predictor (`reconstruction`); `gather` = True fetches each row's kept keys and values instead
    of masking the others.
    """

    mask: Tensor
    estimate: Tensor

    def __init__(
        self, dim: int, heads: int, tokens: int, *, rank: int | None = None, keep: float = 0.25, basis_threshold: float = 0.0,
        coefficient_threshold: float = 0.0, scale: float | None = None, exclude_class: bool = True, reduction: int = 2, bias: bool = True,
        coefficient_top: int = 0, estimate_threshold: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.tokens = tokens
        self.dim = dim
        if not 0 < keep <= 1:
            raise RegardError(f"keep={keep}; expected a share in (0, 1]")
        width = dim // heads
        if dim % heads or width % reduction or coefficient_top < 0:
            raise RegardError(
                f"dim={dim}, heads={heads}, reduction={reduction}, coefficient_top={coefficient_top}: expected multiples, and 0 or more"
            )
        self.heads, self.keep, self.exclude_class = heads, keep, exclude_class
        self.basis_threshold, self.coefficient_threshold, self.scale = basis_threshold, coefficient_threshold, scale or heads**-0.5
        self.coefficient_top, self.estimate_threshold = coefficient_top, estimate_threshold
        rank = rank or max(1, tokens // 8)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.reduce_q, self.reduce_k = (nn.Linear(width, width // reduction, bias) for _ in range(2))  # shared by the heads
        self.down, self.up = (nn.Parameter(torch.randn(tokens, rank) * tokens**-0.5) for _ in range(2))
        self.sparse, self.gather = True, False

    def predict(self, q: Tensor, k: Tensor, thresholds: bool = True, real: Tensor | None = None) -> Tensor:
        """The estimate (B, H, N - 1 or N, N) of the attention rows; without thresholds and |.| of P_up while it is being trained.

        real (B, N) bool: tokens that are left; the others' reduced q and k are zero.
        """
        small_q, small_k = self.reduce_q(q), self.reduce_k(k)
        if real is not None:
            small_q, small_k = (y * real[:, None, :, None].to(y.dtype) for y in (small_q, small_k))
        rows = small_q[..., 1:, :] if self.exclude_class else small_q
        c = (self.scale * rows @ (small_k.transpose(-1, -2) @ self.down)).softmax(-1)
        if not thresholds:
            return c @ self.up.T
        basis = self.up.abs().T
        basis = basis.masked_fill(basis <= self.basis_threshold, 0.0)
        if self.coefficient_top:
            best = c.detach().topk(min(self.coefficient_top, c.shape[-1]), -1).indices
            c = c * torch.zeros_like(c).scatter_(-1, best, 1.0)
        return c.masked_fill(c < self.coefficient_threshold, 0.0) @ basis

    def connectivity(self, estimate: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, H, N, N) bool: each row's ceil(keep N) largest, or those above the threshold; the class token's row is full.

        real (B, N) bool: tokens that earlier layers have left; others neither read nor are read, but by the class token, whose row stays full
        (their keys and values are zero, as released). A row keeps at most as many keys as tokens are left.
        """
        score = estimate.detach()
        score = score if real is None else score.masked_fill(~real[:, None, None], float("-inf"))
        if self.estimate_threshold is not None:
            chosen = score > self.estimate_threshold
        else:
            count = torch.full_like(score[:, :1, :1, :1], math.ceil(self.keep * estimate.shape[-1]), dtype=torch.long)
            count = count if real is None else torch.minimum(count, real[:, 1:].sum(-1)[:, None, None, None])
            chosen = top_k(score, score > float("-inf"), count)
        if real is not None:
            rows = real[:, 1:] if self.exclude_class else real
            chosen = chosen & rows[:, None, :, None] & real[:, None, None]
        return F.pad(chosen, (0, 0, 1, 0), value=True) if self.exclude_class else chosen

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """token_mask (B, N - 1) bool: False for tokens that a layer before has pruned; their q, k and v are zero, and their rows too."""
        if x.dim() != 3 or x.shape[1] != len(self.down):
            raise RegardError(
                f"x has shape {tuple(x.shape)}; expected (batch, tokens={len(self.down)}, dim), for which the predictor is made"
            )
        q, k, v = self.split(x)
        real = None
        if token_mask is not None:
            if token_mask.dtype != torch.bool or tuple(token_mask.shape) != (x.shape[0], x.shape[1] - 1):
                raise RegardError(
                    f"token_mask is {token_mask.dtype} {tuple(token_mask.shape)}; expected bool {(x.shape[0], x.shape[1] - 1)}, without the class token"
                )
            real = F.pad(token_mask, (1, 0), value=True)
            q, k, v = (y * real[:, None, :, None].to(y.dtype) for y in (q, k, v))
        self.estimate = self.predict(q, k, real=real)
        self.mask = self.connectivity(self.estimate, real)
        if self.gather and self.sparse:
            o = gathered(q, k, v, self.mask)
        else:
            o = attend(q, k, v, mask=self.mask) if self.sparse or real is not None else attend(q, k, v)
        return self.out(o.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def reconstruction(self, q: Tensor, k: Tensor, teacher: Tensor) -> Tensor:
        """Sum of squared differences of the estimate (no thresholds) to the teacher's rows (B, H, N - 1 or N, N)."""
        return (self.predict(q, k, thresholds=False) - teacher).square().sum()


def gathered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention under a mask (B, H, N, N) row by row over the kept keys alone: the first row, which reads all, and the others padded to the
    most keys one of them keeps."""
    first = attend(q[..., :1, :], k, v, mask=mask[..., :1, :])
    counts = mask[..., 1:, :].sum(-1, keepdim=True)
    most = int(counts.max()) if counts.numel() else 0
    places = mask[..., 1:, :].to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    keys, values = (
        x[:, :, None].expand(-1, -1, places.shape[2], -1, -1).gather(3, places[..., None].expand(*places.shape, x.shape[-1]))
        for x in (k, v)
    )
    real = torch.arange(most, device=q.device) < counts
    one, keys, values = (x.flatten(0, 2)[:, None] for x in (q[..., 1:, None, :], keys, values))
    rest = attend(one, keys, values, mask=real.flatten(0, 2)[:, None, None]).reshape(*q.shape[:2], -1, v.shape[-1])
    return torch.cat((first, rest), -2)


def distillation(student: Tensor, teacher: Tensor, tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    """KL(teacher || student) of logits, a sample's mean, plus the mean squared difference of the last layer's tokens."""
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="batchmean") + F.mse_loss(
        tokens, teacher_tokens
    )


def prune_tokens(x: Tensor, attention: Tensor, keep: float) -> Tensor:
    """The class token and the ceil(keep (N - 1)) tokens it looks at most: x (B, N, C), attention (B, H, N, N) -> (B, n, C), in order."""
    scores = attention[:, :, 0, 1:].mean(1)
    places = scores.topk(math.ceil(keep * scores.shape[-1]), -1).indices.sort(-1).values + 1
    places = F.pad(places, (1, 0))
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def mhsa_flops(tokens: int, dim: int, heads: int, keep: float | None, rank: int | None = None, active: float = 1.0) -> float:
    """Of one layer's products over tokens: dense 2 N^2 d multiply-adds; sparse: the predictor's N r d / 2 twice (half the width), a product of
    N^2 r a head of which the share `active` is not zero, and 2 k N d over kept pairs, k = ceil(keep N). Two FLOP each."""
    if keep is None:
        return 2 * 2 * tokens**2 * dim
    rank = rank or tokens // 8
    return 2 * (2 * tokens * rank * dim / 2 + active * heads * tokens**2 * rank + 2 * math.ceil(keep * tokens) * tokens * dim)
