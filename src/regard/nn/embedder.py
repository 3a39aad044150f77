"""One vector for a sequence: a backbone's states, pooled by their mean, by the last token, or by attention to latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Padding
from ..engine.door import attend
from ..errors import RegardError
from .decoder import Decoder
from .parts import takes

Pool = Callable[[Tensor, Tensor], Tensor]


def mean_pool(states: Tensor, keep: Tensor) -> Tensor:
    """states (B, T, D), keep (B, T) bool: the mean of the tokens that are no padding, (B, D)."""
    held = torch.where(keep[..., None], states, 0.0)
    return held.sum(1) / keep.sum(1, keepdim=True).clamp_min(1)


def last_pool(states: Tensor, keep: Tensor) -> Tensor:
    """The last token that is no padding, whichever side padding is on."""
    places = torch.arange(keep.shape[1], device=keep.device)
    at = torch.where(keep, places, -1).amax(1).clamp_min(0)
    return states.take_along_dim(at[:, None, None], 1)[:, 0]


class LatentPool(nn.Module):
    """Tokens read a learned table of latents, and their mean is taken (NV-Embed; Lee et al., 2024): states (B, T, dim) -> (B, dim).

    h = x + Attention(LN(x), LN'(latents)),  y = h + W2 (a gelu(g)) with a, g = W1 LN''(h),  mean of y over tokens that are no padding.
    head_dim None: dim, as released (8 heads of 4096 channels). ratio: width of the MLP over dim.
    """

    def __init__(self, dim: int, latents: int = 512, heads: int = 8, head_dim: int | None = None, ratio: int = 4):
        super().__init__()
        self.dim, self.heads = dim, heads
        inner = heads * (head_dim or dim)
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.norm, self.latent_norm, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.q, self.kv, self.out = nn.Linear(dim, inner, False), nn.Linear(dim, 2 * inner, False), nn.Linear(inner, dim, False)
        self.up, self.down = nn.Linear(dim, 2 * ratio * dim), nn.Linear(ratio * dim, dim)

    @takes(states="batch length dim", keep="batch length")
    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        k, v = (y.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for y in self.kv(self.latent_norm(self.latents)).chunk(2, -1))
        q = self.q(self.norm(states)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read = attend(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1))
        h = states + self.out(read.transpose(1, 2).flatten(-2))
        a, gate = self.up(self.mlp_norm(h)).chunk(2, -1)
        return mean_pool(h + self.down(a * F.gelu(gate)), keep)


POOLS: dict[str, Pool] = {"mean": mean_pool, "last": last_pool}


class Embedder(nn.Module):
    """ids (B, T), keep (B, T) bool (None: all) -> one vector a sequence (B, D), not normalised.

    model: a Decoder, a model of transformers, or any module with `embed` (ids -> (B, T, d)) and `states` ((B, T, d), keep) -> (B, T, D).
    pool: "mean", "last", or a module such as `LatentPool`.
    """

    def __init__(self, model: nn.Module, pool: str | Pool = "mean"):
        super().__init__()
        if isinstance(pool, str) and pool not in POOLS:
            raise RegardError(f"pool={pool!r}; expected one of {', '.join(POOLS)}, or a module")
        if not isinstance(model, Decoder) and not (
            hasattr(model, "get_input_embeddings") or (hasattr(model, "embed") and hasattr(model, "states"))
        ):
            raise RegardError(
                f"model {type(model).__name__}: expected a Decoder, a model of transformers, or a module with embed and states"
            )
        self.model, self.pool = model, POOLS[pool] if isinstance(pool, str) else pool

    def embed(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        return model.embed(ids) if hasattr(model, "embed") else model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def states(self, embedded: Tensor, keep: Tensor) -> Tensor:
        """The last states (B, T, D) of embedded tokens (B, T, d)."""
        model: Any = self.model
        if isinstance(model, Decoder):
            given: dict[str, Any] = {} if bool(keep.all()) else {"mask": Padding(), "keep": keep}
            for block in model.blocks:
                embedded = block(embedded, **given)
            return model.norm(embedded)  # type: ignore[no-any-return]
        if hasattr(model, "states"):
            return model.states(embedded, keep)  # type: ignore[no-any-return]
        return model.base_model(inputs_embeds=embedded, attention_mask=keep.long()).last_hidden_state  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, keep: Tensor | None = None, embedded: Tensor | None = None) -> Tensor:
        """embedded (B, T, d): embeddings in place of those of `ids`."""
        keep = torch.ones(ids.shape, dtype=torch.bool, device=ids.device) if keep is None else keep
        return self.pool(self.states(self.embed(ids) if embedded is None else embedded, keep), keep)
