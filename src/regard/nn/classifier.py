"""A small classifier of sequences around any mechanism that reads whole sequences: pre-norm blocks, the mean over tokens, a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..algebra import Mechanism, Padding
from ..catalog import get
from ..catalog.making import placeable
from ..errors import RegardError
from .attention import Attention
from .decoder import Block


@placeable
class SequenceClassifier(nn.Module):
    """Tokens (B, L) of `vocab` symbols, or values (B, L, features), -> logits (B, classes).

    mechanism: a name or description for all layers, run without a causal mask, or a ready module for each of them. length: the longest
    sequence, for learned positions. hidden: width of the MLP (None: twice dim). RegardError: both or neither of vocab and features given,
    modules that are not `layers` many, longer sequences.
    """

    def __init__(
        self,
        mechanism: str | Mechanism | Sequence[nn.Module],
        *,
        classes: int,
        length: int,
        vocab: int | None = None,
        features: int | None = None,
        dim: int = 32,
        layers: int = 2,
        heads: int = 2,
        hidden: int | None = None,
    ):
        super().__init__()
        if (vocab is None) == (features is None):
            raise RegardError(f"vocab={vocab}, features={features}; expected one of them: symbols or values")
        if isinstance(mechanism, (str, Mechanism)):
            mixers: list[nn.Module] = [
                Attention(dim, heads, mechanism, causal=one_way(mechanism), context_len=length) for _ in range(layers)
            ]
        else:
            mixers = list(mechanism)
        if len(mixers) != layers:
            raise RegardError(f"mechanism gives {len(mixers)} layers; expected layers={layers}")
        self.embed: nn.Module = nn.Embedding(vocab, dim) if vocab is not None else nn.Linear(int(features or 0), dim)
        self.places = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList([Block(dim, one, hidden or 2 * dim) for one in mixers])
        self.norm, self.head = nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, classes)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, L) bool: tokens that are no padding (None: all)."""
        if x.shape[1] > len(self.places):
            raise RegardError(f"x has {x.shape[1]} tokens; expected at most length={len(self.places)}")
        h = self.embed(x) + self.places[: x.shape[1]]
        given = {} if keep is None else {"mask": Padding(), "keep": keep}
        for block in self.blocks:
            h = block(h, **given)
        h = self.norm(h)
        if keep is None:
            return self.head(h.mean(1))  # type: ignore[no-any-return]
        there = keep[..., None]
        return self.head(torch.where(there, h, 0.0).sum(1) / there.sum(1).clamp_min(1))  # type: ignore[no-any-return]


def one_way(mechanism: str | Mechanism) -> bool:
    """Whether a mechanism can read the past alone, and so must."""
    return (get(mechanism) if isinstance(mechanism, str) else mechanism).causal_only
