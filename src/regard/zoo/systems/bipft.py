"""BiPFT: one-bit attention whose scores and values get back, by estimators of rank r, what binarising took from them (id 200; Xing et al., 2023).

q, k, v = binary linear layers of h, split in heads and binarised: q_b, k_b, v_b;   q k^T = q_b k_b^T + q_b e_k^T + e_q k_b^T + e_q e_k^T
S = (q_b k_b^T + m_q p_k^T + p_q m_k^T + p_q p_k^T) / sqrt(d), p and m: Linear(D -> r) of h, shared by heads;   P = binarised softmax(S)
context = P v_b + P (v_p 1^T), v_p: Linear(D -> 1);   then a binary output layer, residual, LayerNorm, and a binary GELU layer the same way
Not built: binary word embeddings, and starting from a pretrained BERT.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.binary import Binarizer, BinaryLinear
from regard.nn.parts import takes


def residual_terms(p_q: Tensor, p_k: Tensor, m_q: Tensor, m_k: Tensor) -> Tensor:
    """m_q p_k^T + p_q m_k^T + p_q p_k^T of (B, L, r): of rank 2 r at most. With residuals for p and binarised parts for m: what q k^T lost."""
    return m_q @ p_k.mT + p_q @ m_k.mT + p_q @ p_k.mT


@register("bipft", kind="module")
class BinarySelfAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), heads side by side, not projected again. rank: of the estimators (0: none). dropout: of probabilities, before
    they are binarised. keep (B, L) bool: tokens that are there."""

    def __init__(self, dim: int, heads: int, rank: int = 1, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        if dim % heads or rank < 0:
            raise RegardError(f"dim={dim}, heads={heads}, rank={rank}: expected dim a multiple of heads, and a rank of 0 or more")
        self.dim, self.heads, self.rank = dim, heads, rank
        self.query, self.key, self.value = (BinaryLinear(dim, dim, bias) for _ in range(3))
        self.binary_q, self.binary_k, self.binary_v, self.binary_p = (Binarizer(), Binarizer(), Binarizer(), Binarizer(signed=False))
        if rank:
            self.p_q, self.p_k, self.m_q, self.m_k = (nn.Linear(dim, rank) for _ in range(4))
            self.p_v = nn.Linear(dim, 1)
        self.drop = nn.Dropout(dropout)

    def estimates(self, x: Tensor) -> Tensor:
        """What is added to the scores of every head, (B, 1, L, L)."""
        return residual_terms(self.p_q(x), self.p_k(x), self.m_q(x), self.m_k(x)).unsqueeze(1)

    def probabilities(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """P (B, H, L, L) of two values."""
        q, k = (
            b(layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2))
            for b, layer in ((self.binary_q, self.query), (self.binary_k, self.key))
        )
        s = q @ k.mT
        s = (s + self.estimates(x) if self.rank else s) / q.shape[-1] ** 0.5
        if keep is not None:
            s = s.masked_fill(~keep[:, None, None], torch.finfo(s.dtype).min)
        p = self.drop(s.softmax(-1))
        return self.binary_p(p if keep is None else p * keep[:, None, None])  # type: ignore[no-any-return]

    @takes(x="batch length dim")
    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = x if keep is None else torch.where(keep[..., None], x, 0.0)
        v = self.binary_v(self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        p = self.probabilities(x, keep)
        o = p @ v
        o = o + p @ self.p_v(x)[:, None] if self.rank else o
        return o.transpose(1, 2).flatten(2)


class BinaryBlock(nn.Module):
    """A layer of BERT of one-bit products: x (B, L, dim) -> (B, L, dim). hidden: of the GELU layer. options: of `BinarySelfAttention`."""

    def __init__(self, dim: int, heads: int, hidden: int | None = None, eps: float = 1e-12, hidden_dropout: float = 0.0, **options: Any):
        super().__init__()
        self.attention, self.out = BinarySelfAttention(dim, heads, **options), BinaryLinear(dim, dim)
        self.up, self.down = BinaryLinear(dim, hidden or 4 * dim), BinaryLinear(hidden or 4 * dim, dim)
        self.norm1, self.norm2, self.drop = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps), nn.Dropout(hidden_dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.drop(self.out(self.attention(x, keep))))
        return self.norm2(x + self.drop(self.down(F.gelu(self.up(x)))))  # type: ignore[no-any-return]


class BinaryBert(nn.Module):
    """Tokens ids (B, L) -> logits (B, L, vocab): embeddings and the output layer in full precision, binary blocks between. options: of the blocks."""

    def __init__(self, vocab: int, dim: int = 64, layers: int = 2, heads: int = 4, length: int = 128, **options: Any):
        super().__init__()
        self.embed, self.place, self.norm = nn.Embedding(vocab, dim), nn.Embedding(length, dim), nn.LayerNorm(dim, 1e-12)
        self.blocks = nn.ModuleList(BinaryBlock(dim, heads, **options) for _ in range(layers))
        self.transform, self.norm2, self.head = nn.Linear(dim, dim), nn.LayerNorm(dim, 1e-12), nn.Linear(dim, vocab)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.norm(self.embed(ids) + self.place.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x, keep)
        return self.head(self.norm2(F.gelu(self.transform(x))))  # type: ignore[no-any-return]


def masked(ids: Tensor, mask_id: int, vocab: int, generator: torch.Generator, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """(ids to read, labels with -100 where nothing is asked): of `share` of the tokens 8 in 10 become mask_id, 1 in 10 another token."""
    asked, how = (torch.rand(ids.shape, generator=generator) for _ in range(2))
    other = torch.randint(vocab, ids.shape, generator=generator)
    seen = torch.where(how < 0.8, mask_id, torch.where(how < 0.9, other, ids))
    return torch.where(asked < share, seen, ids), torch.where(asked < share, ids, -100)


def mlm_loss(model: nn.Module, seen: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(seen).flatten(0, 1), labels.flatten(), ignore_index=-100)


def cost(dim: int, heads: int, length: int, hidden: int | None = None, rank: int = 1, layers: int = 1) -> dict[str, float]:
    """Of so many layers on one text: products on one bit and in full precision, operations (64 one-bit ones count as one), and bits of weights;
    and the same of the plain layer, as `full_operations` and `full_bits`."""
    hidden = hidden or 4 * dim
    weights = 4 * dim * dim + 2 * dim * hidden
    binary = 2 * length * weights + 2 * 2 * length * length * dim
    estimators = 2 * length * dim * (4 * rank + (rank > 0)) + (2 * 3 * length * length * rank + 2 * length * length * heads if rank else 0)
    small = 12 * dim + 2 * (dim + hidden) + ((dim + 1) * (4 * rank + 1) if rank else 0) + 10
    return {
        "binary": float(layers * binary),
        "full": float(layers * estimators),
        "operations": layers * (binary / 64 + estimators),
        "bits": layers * (weights + 32.0 * small),
        "full_operations": float(layers * binary),
        "full_bits": layers * 32.0 * (weights + 4 * dim + hidden + dim + 4 * dim),
    }
