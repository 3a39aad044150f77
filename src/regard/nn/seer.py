"""SeerAttention: a small gate learns from the dense attention which blocks matter (Gao et al., 2024).

G = rope(W_q avg(Q_u)) . rope(W_k [max; min; avg](K_w)) / sqrt(d_g);  trained: KL(GT || softmax G), GT_uw = max of the probabilities in (u, w)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..algebra import Causal, Chosen, Input, Rope, Selection, View, Weighted
from ..algebra.blocks import HIDDEN, cut, heads_of, pooled, top_k
from ..catalog.registry import register
from ..engine import attend
from ..errors import RegardError


def pooled_three(k: Tensor, size: int) -> Tensor:
    """Max, min and mean of each block's keys side by side: (..., n, 3 D)."""
    short = -k.shape[-2] % size
    blocks = cut(torch.cat((k, k[..., -1:, :].expand(*k.shape[:-2], short, -1)), -2) if short else k, size)
    return torch.cat((blocks.amax(-2), blocks.amin(-2), pooled(k, size)), -1)


class AttnGate(nn.Module):
    """q (B, H, L, D), k (B, Hkv, L, D), both before rotary positions -> logits (B, H, nq, nk), block-causal ones finite.

    width: d_g. rope: rotate pooled q and k at the first position of their blocks.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, *, width: int = 128, block_size: int = 64, rope: bool = True):
        super().__init__()
        self.block_size, self.rope = block_size, Rope() if rope else None
        self.q = nn.Parameter(torch.randn(heads, head_dim, width) * head_dim**-0.5)
        self.k = nn.Parameter(torch.randn(kv_heads, 3 * head_dim, width) * (3 * head_dim) ** -0.5)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        g_q, g_k = pooled(q, self.block_size) @ self.q, pooled_three(k, self.block_size) @ self.k
        if self.rope is not None:
            g_q, g_k = (self.rope.rotate(g, torch.arange(g.shape[-2], device=g.device) * self.block_size) for g in (g_q, g_k))
        s = g_q @ heads_of(g_k, q.shape[1]).transpose(-1, -2) * g_q.shape[-1] ** -0.5
        return s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(s.shape[-1] - s.shape[-2]), HIDDEN)


@torch.no_grad()
def block_maxima(q: Tensor, k: Tensor, block_size: int, normalise: bool = True, scale: float | None = None) -> Tensor:
    """Ground truth (B, H, n, n): the largest causal probability of each block pair, without the matrix: a row of blocks at a time.

    Tile maxima are taken with the running row maximum, then rescaled by exp(max - lse). normalise: rows sum to one.
    """
    k, rows = heads_of(k, q.shape[1]), []
    count = -(-k.shape[-2] // block_size)
    at = torch.arange(k.shape[-2], device=q.device)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    for start in range(0, q.shape[-2], block_size):
        part = q[..., start : start + block_size, :]
        seen = at[start : start + part.shape[-2], None]
        tops, lse = [], torch.full_like(part[..., :1], HIDDEN)
        for w in range(count):
            if w * block_size > start + block_size - 1:
                tops.append(torch.full_like(part[..., :1], HIDDEN))
                continue
            columns = slice(w * block_size, (w + 1) * block_size)
            s = (part @ k[..., columns, :].transpose(-1, -2)).masked_fill(at[columns] > seen, HIDDEN)
            tops.append(s.amax(-1, keepdim=True))
            lse = torch.logaddexp(lse, s.logsumexp(-1, keepdim=True))
        rows.append(torch.exp(torch.cat(tops, -1) - lse).amax(-2))
    truth = torch.stack(rows, -2)
    return truth / truth.sum(-1, keepdim=True) if normalise else truth


def gate_loss(logits: Tensor, truth: Tensor, skip: float = 0.25) -> Tensor:
    """Mean over elements of KL(truth || softmax(logits)); the first `skip` share of rows is left out."""
    first = int(skip * logits.shape[-2])
    p, log_p = truth[..., first:, :], logits[..., first:, :].log_softmax(-1)
    return torch.where(p > 0, p * (p.clamp_min(1e-30).log() - log_p), 0.0).mean()


def gated_blocks(q: Tensor, k: Tensor, view: View, gate: Tensor, threshold: Tensor, ratio: Tensor, size: Tensor) -> Selection:
    """Blocks whose softmax score exceeds `threshold`, or the best (1 - sqrt(1 - ratio)) n of each row when ratio > 0."""
    score, count = gate.softmax(-1), gate.shape[-1]
    causal = torch.isfinite(gate)
    if float(ratio) > 0:
        keep = top_k(gate, causal, max(1, round((1 - (1 - float(ratio)) ** 0.5) * count)))
    else:
        keep = (score > threshold) & causal
        keep = keep | top_k(gate, causal, 1)
    return Selection(keep.expand(q.shape[0], q.shape[1], -1, -1), int(size), int(size))


GATED = Weighted(
    mask=Causal(),
    select=Chosen(gated_blocks, ahead=True, decode=False),
    inputs=(Input("gate", "bhff"), Input("threshold", "", 2e-3), Input("ratio", "", 0.0), Input("size", "", dtype="int")),
)


@register("seerattention", kind="module")
class SeerAttention(nn.Module):
    """Sparse causal attention of q (B, H, L, D), k, v (B, Hkv, L, D) before rotary positions, by a learned gate.

    threshold: block probability to keep a block (0: dense), or ratio: share of the causal blocks (nz). last_dense: rows of blocks at the end
    that read everything. `distil(q, k)` is the loss of the gate alone: q and k get no gradient. Chunks of fewer queries than keys, and
    decoding, run dense.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, *, width: int = 128, block_size: int = 64, threshold: float = 2e-3,
        ratio: float | None = None, last_dense: int = 0, rope: bool = True,
    ):  # fmt: skip
        super().__init__()
        if ratio is not None and not 0 < ratio <= 1:
            raise RegardError(f"ratio={ratio}; expected a share in (0, 1]")
        self.gate = AttnGate(heads, kv_heads, head_dim, width=width, block_size=block_size, rope=rope)
        self.threshold, self.ratio, self.last_dense, self.rope = threshold, ratio, last_dense, Rope() if rope else None

    def rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return q, k
        behind = k.shape[-2] - q.shape[-2]
        return self.rope.rotate(q, torch.arange(behind, k.shape[-2], device=q.device)), self.rope.rotate(
            k, torch.arange(k.shape[-2], device=k.device)
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned_q, turned_k = self.rotated(q, k)
        if q.shape[-2] != k.shape[-2] or (self.threshold <= 0 and self.ratio is None):
            return attend(turned_q, turned_k, v, mask=Causal())
        logits = self.gate(q, k).detach()
        if self.last_dense:
            logits[..., -self.last_dense :, :] = torch.where(torch.isfinite(logits[..., -self.last_dense :, :]), 0.0, HIDDEN)
        given = {"gate": logits, "size": self.gate.block_size, "threshold": self.threshold, "ratio": self.ratio or 0.0}
        return attend(turned_q, turned_k, v, GATED, **given)

    def distil(self, q: Tensor, k: Tensor) -> Tensor:
        """KL of the gate to the block maxima of the dense attention."""
        q, k = q.detach(), k.detach()
        turned_q, turned_k = self.rotated(q, k)
        return gate_loss(self.gate(q, k), block_maxima(turned_q, turned_k, self.gate.block_size))
