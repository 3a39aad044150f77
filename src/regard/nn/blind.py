"""Blocks with a fixed state and an attention that reads places before contents, as recurrent speech models have them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Causal, Padding, Rope
from ..catalog import get
from ..engine.door import attend
from .attention import Attention


class Gated(nn.Module):
    """W2(silu(a) * b) of (a, b) = W1 x, hidden 4/3 dim, with biases."""

    def __init__(self, dim: int):
        super().__init__()
        self.into, self.out = nn.Linear(dim, dim * 4 // 3 * 2), nn.Linear(dim * 4 // 3, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.into(x).chunk(2, -1)
        return self.out(F.silu(gate) * x)  # type: ignore[no-any-return]


class GLABlock(nn.Module):
    """x (B, L, dim), state (B or 1, H, dk, dv) or None -> y, new state: x + GLA(LN x), then x + MLP(LN x), dropout behind. expand_k, expand_v:
    widths of keys and values over dim."""

    def __init__(self, dim: int, heads: int, expand_k: float = 1.0, expand_v: float = 2.0, dropout: float = 0.0):
        super().__init__()
        self.mixer = Attention(dim, heads, get("gla", key_dim=int(dim * expand_k) // heads), head_dim=int(dim * expand_v) // heads)
        for part in self.mixer.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight, gain=2**-2.5)
        self.mlp, self.norm1, self.norm2, self.drop = Gated(dim), nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, dk, dv)."""
        return self.mixer.heads, self.mixer.key_dim, self.mixer.value_dim

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.norm1(x)
        q, k, v, _ = self.mixer.heads_of(y, y, 0, None)
        made = self.mixer.inputs(y, {"q": q, "k": k, "v": v})
        first = x.new_zeros(len(x), *self.state_shape) if state is None else state.to(x.dtype).expand(len(x), -1, -1, -1)
        o, new = attend(q, k, v, self.mixer.mechanism, mask=Causal(), state=first, return_state=True, **made)
        x = x + self.mixer.close(o, y)
        return self.drop(x + self.mlp(self.norm2(x))), new.s


class ReaderBlock(nn.Module):
    """x (B, L, dim) -> the same: attention of all tokens with rotary positions on half of each head's channels, no output projection; MLP."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1):
        super().__init__()
        self.heads, self.rope = heads, Rope(dims=dim // heads // 2, interleaved=True)
        self.qkv, self.mlp = nn.Linear(dim, 3 * dim), Gated(dim)
        self.norm1, self.norm2, self.drop = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1], device=x.device)
        q, k = self.rope.rotate(q, at), self.rope.rotate(k, at)
        o = attend(q, k, v) if keep is None else attend(q, k, v, mask=Padding(), keep=keep)
        x = x + o.transpose(1, 2).flatten(2)
        return self.drop(x + self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


def sinusoids(count: int, dim: int, like: Tensor) -> Tensor:
    """(count, dim): sin(p w_c), then sin(p w_c + pi / 2), w_c = 10000^(-2c / dim)."""
    rates = 10000.0 ** (-2 * torch.arange(dim // 2, device=like.device, dtype=torch.float64) / dim)
    turns = torch.arange(count, device=like.device)[:, None] * rates
    return torch.cat((turns, turns + math.pi / 2), 1).sin().to(like.dtype)


class BlindCrossAttention(nn.Module):
    """x (B, T, dim), text (B, S, dim), state -> z (B, T, dim), weights of both looks (B, 2, T, S), new state.

    p = softmax(q k^T / sqrt(dim)) PE; p <- block(p); z = softmax(p PE^T / sqrt(places)) v, with q, k, v = LN(W x): contents are read by place alone.
    """

    def __init__(self, dim: int, heads: int, places: int | None = None, dropout: float = 0.1, expand_v: float = 2.0):
        super().__init__()
        self.places = dim if places is None else places
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim) for _ in range(3))
        self.block, self.dropout = GLABlock(self.places, heads, expand_v=expand_v), dropout

    def look(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        s = q @ k.mT / math.sqrt(q.shape[-1])
        p = (s if keep is None else s.masked_fill(~keep[:, None], torch.finfo(s.dtype).min)).softmax(-1)
        return F.dropout(p, self.dropout, self.training) @ v, p

    def forward(self, x: Tensor, text: Tensor, keep: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(text)), self.norm_v(self.v(text))
        places = sinusoids(text.shape[1], self.places, x)
        p, first = self.look(q, k, places.expand(len(x), -1, -1), keep)
        p, state = self.block(p, state)
        z, second = self.look(p, places.expand(len(x), -1, -1), v, keep)
        return z, torch.stack((first, second), 1), state


__all__ = ["BlindCrossAttention", "GLABlock", "ReaderBlock", "sinusoids"]
