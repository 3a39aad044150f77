"""Softmax attention as layers of image nets write it, its query from one sequence and its keys from another or the same."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ...algebra import Padding
from ...engine.door import attend
from ...errors import RegardError


class TokenAttention(nn.Module):
    """x (B, N, dim), source (B, M, dim) (None: x) -> (B, N, inner): q = W_q x, k, v = W_kv source, all keys visible, output projection with bias.

    inner: channels of all heads together (None: dim). dropout: of weights, proj_dropout: of the output, both in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        inner: int | None = None,
        qkv_bias: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ):
        super().__init__()
        inner = inner or dim
        if heads < 1 or inner % heads:
            raise RegardError(f"{inner} channels are no multiple of heads={heads}; expected one")
        self.heads, self.scale, self.dropout = heads, scale, dropout
        self.q, self.kv = nn.Linear(dim, inner, qkv_bias), nn.Linear(dim, 2 * inner, qkv_bias)
        self.out, self.drop = nn.Linear(inner, inner), nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, source: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """keep (B, M) bool: keys that are there (None: all); a row without any reads zeros."""
        made = (self.q(x), *self.kv(x if source is None else source).chunk(2, -1))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in made)
        dropped = self.dropout if self.training else 0.0
        if keep is None:
            read = attend(q, k, v, scale=self.scale, dropout_p=dropped)
        else:
            read = attend(q, k, v, mask=Padding(), keep=keep, scale=self.scale, dropout_p=dropped)
        return self.drop(self.out(read.transpose(1, 2).flatten(-2)))  # type: ignore[no-any-return]


def known_grid(tokens: int, shape: tuple[int, int] | None) -> tuple[int, int]:
    """The grid (H, W) of a number of tokens: as given, or a square."""
    side = math.isqrt(tokens)
    found = (side, side) if shape is None else shape
    if found[0] * found[1] != tokens:
        raise RegardError(f"x has {tokens} tokens, shape is {shape}; expected shape=(H, W) with as many, or a square number of tokens")
    return found
