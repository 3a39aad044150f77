"""LAMA: many heads of one low-rank affinity between tokens and a global context (id 154; Mehta et al., 2019).

F = tanh((H P) * (Q^T c)^T) in R^{L x m};   A = softmax over L of F, a column a head;   M = A^T H;   output flatten(M)
Summed over heads and without tanh, F is h^T (P Q^T) c. Parameters: 4 u m and a context of 2 u.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes


@register("lama", kind="module")
class LAMAPool(nn.Module):
    """A sequence to one vector: x (B, L, dim) -> (document (B, heads * dim), weights (B, heads, L)).

    context: "learned", a vector of the layer, or "mean" of the tokens there are. tanh, normalise: whether scores are squashed, and before that
    scaled to unit length over the heads (which the paper leaves open). Cost O(L * heads).
    """

    def __init__(self, dim: int, heads: int, context: str = "learned", tanh: bool = True, normalise: bool = False):
        super().__init__()
        if context not in ("learned", "mean") or heads < 1:
            raise RegardError(f"context={context!r}, heads={heads}: expected 'learned' or 'mean', and at least one head")
        self.dim, self.heads, self.tanh, self.normalise = dim, heads, tanh, normalise
        self.p, self.q = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, heads))) for _ in range(2))
        self.context = nn.Parameter(nn.init.normal_(torch.empty(dim), std=dim**-0.5)) if context == "learned" else None

    def scores(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The products (P^T h) * (Q^T c) before tanh, (B, L, heads)."""
        if self.context is not None:
            c = self.context.expand(x.shape[0], -1)
        elif keep is None:
            c = x.mean(1)
        else:
            c = x.sum(1) / keep.sum(1, keepdim=True).clamp_min(1)
        return (x @ self.p) * (c @ self.q)[:, None]

    @takes(x="batch length dim", keep="batch length")
    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """keep (B, L) bool: the tokens there are (None: all). A row without any gives zeros."""
        if keep is not None:
            x = torch.where(keep[..., None], x, 0.0)
        f = self.scores(x, keep)
        f = nn.functional.normalize(f, dim=-1) if self.normalise else f
        f = torch.tanh(f) if self.tanh else f
        if keep is not None:
            f = f.masked_fill(~keep[..., None], -torch.inf).masked_fill(~keep.any(1)[:, None, None], 0.0)
        a = f.softmax(1).transpose(1, 2)
        a = a if keep is None else torch.where(keep[:, None], a, 0.0)
        return (a @ x).flatten(1), a


def diversity(weights: Tensor) -> Tensor:
    """Penalty ||A^T A - I||_F^2, mean over the batch; weights (B, heads, L)."""
    eye = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
    return (weights @ weights.transpose(1, 2) - eye).square().sum((1, 2)).mean()


class LAMAClassifier(nn.Module):
    """Embedding, a GRU in both directions, LAMA, and a linear layer: tokens (B, L) -> logits (B, classes)."""

    def __init__(
        self, vocab: int, classes: int, embedding: int = 64, units: int = 64, heads: int = 8, context: str = "learned", dropout: float = 0.0
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab, embedding)
        self.gru = nn.GRU(embedding, units, batch_first=True, bidirectional=True)
        self.pool, self.drop = LAMAPool(2 * units, heads, context), nn.Dropout(dropout)
        self.head = nn.Linear(heads * 2 * units, classes)

    def encode(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """States (B, L, 2 units). keep (B, L) bool: padding stands on the right, and no state has read it."""
        x = self.embed(tokens)
        if keep is None:
            return self.gru(x)[0]  # type: ignore[no-any-return]
        sizes = keep.sum(1)
        if keep.shape != tokens.shape or bool(
            (keep.cumsum(1)[:, -1] != (keep.long() * torch.arange(1, keep.shape[1] + 1, device=keep.device)).amax(1)).any()
        ):
            raise RegardError(f"keep {tuple(keep.shape)}: expected (B, L) as tokens, with padding on the right alone")
        packed = pack_padded_sequence(x, sizes.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=tokens.shape[1])[0]

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.head(self.drop(self.pool(self.encode(tokens, keep), keep)[0]))  # type: ignore[no-any-return]
