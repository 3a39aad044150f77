"""NAtS: each token is global, local until the next global one, or seen through a window; the types are learned (Deng et al., 2025).

o = softmax over {j <= i: G, or Loc and i <= nxt(j), or SW and i <= j + W}, nxt(j) the next global token at or after j
Not built: the fine-tuning of a converted model (the layer and `expected_size`, its sparsity loss, are).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Lifetime, Weighted
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import one_by_one, takes, whole

GLOBAL, LOCAL, SLIDING = 0, 1, 2
MASKED = Weighted(mask=Causal() & Lifetime())


def type_lifetimes(types: Tensor, window: int) -> Tensor:
    """until (B, H, L) of integer types (B, H, L): the last query that reads each token."""
    length = types.shape[-1]
    at = torch.arange(length, device=types.device).expand(types.shape)
    following = torch.where(types == GLOBAL, at, length).flip(-1).cummin(-1).values.flip(-1)
    return torch.where(types == GLOBAL, length, torch.where(types == LOCAL, following, at + window))


def soft_mask(y: Tensor, window: int) -> Tensor:
    """(B, H, L, L) of types y (B, H, L, 3), soft or one-hot: y_G + y_SW 1[i <= j + W] + y_Loc prod_{j<t<i} (1 - y_G(t)), causal."""
    length = y.shape[-2]
    at = torch.arange(length, device=y.device)
    later = at > at[:, None]
    alive = torch.where(later, 1 - y[..., None, :, GLOBAL], 1.0).cumprod(-1)  # [j, t]: no global token in (j, t]
    alive = F.pad(alive, (1, 0), value=1.0)[..., :-1].transpose(-1, -2)  # [i, j]: none in (j, i)
    mask = y[..., None, :, GLOBAL] + y[..., None, :, SLIDING] * (at[:, None] <= at + window) + y[..., None, :, LOCAL] * alive
    return mask * (at <= at[:, None])


def surrogate(q: Tensor, k: Tensor, v: Tensor, y: Tensor, window: int) -> Tensor:
    """Attention whose exponentials are multiplied by `soft_mask`: equal to the masked form for one-hot y, and differentiable in y."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    causal = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
    s = s.masked_fill(~causal, float("-inf"))
    w = torch.exp(s - s.amax(-1, keepdim=True)) * soft_mask(y, window)
    return w @ v / w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)


@dataclass
class NAtSCache:
    """What is still read, a (batch, kv head) each: keys, values (n, D), and their types and places."""

    k: list[Tensor]
    v: list[Tensor]
    types: list[Tensor]
    places: list[Tensor]
    length: int = 0

    def sizes(self) -> list[int]:
        """Tokens held by each (batch, head)."""
        return [len(x) for x in self.places]

    def step(self, q: Tensor, k: Tensor, v: Tensor, types: Tensor, window: int) -> Tensor:
        """One token: q (B, H, 1, D), k, v (B, Hkv, 1, D), types (B, Hkv, 1) -> o (B, H, 1, Dv). What no later query reads is dropped."""
        batch, kv_heads = k.shape[:2]
        group, i, outs = q.shape[1] // kv_heads, self.length, []
        for n in range(batch * kv_heads):
            b, h = divmod(n, kv_heads)
            if i == 0:
                for held, x in ((self.k, k), (self.v, v)):
                    held.append(x[b, h, :0])
                for held in (self.types, self.places):
                    held.append(types[b, h, :0])
            self.k[n], self.v[n] = torch.cat((self.k[n], k[b, h])), torch.cat((self.v[n], v[b, h]))
            self.types[n] = torch.cat((self.types[n], types[b, h]))
            self.places[n] = torch.cat((self.places[n], torch.full_like(types[b, h], i)))
            p = (q[b, h * group : (h + 1) * group, 0] @ self.k[n].T * q.shape[-1] ** -0.5).softmax(-1)
            outs.append(p @ self.v[n])
            closed = bool(types[b, h, 0] == GLOBAL)
            dead = ((self.types[n] == LOCAL) & closed) | ((self.types[n] == SLIDING) & (self.places[n] + window <= i))
            self.k[n], self.v[n], self.types[n], self.places[n] = (x[~dead] for x in (self.k[n], self.v[n], self.types[n], self.places[n]))
        self.length += 1
        return torch.stack(outs).unflatten(0, (batch, kv_heads)).flatten(1, 2)[:, :, None]


def cache_size(types: Tensor, window: int) -> Tensor:
    """Tokens that query i + 1 may still read of those up to i, (B, H, L): what a cache must hold after each step."""
    until = type_lifetimes(types, window)
    at = torch.arange(types.shape[-1], device=types.device)
    return ((until[..., None, :] > at[:, None]) & (at <= at[:, None])).sum(-1)


def expected_size(y: Tensor, window: int) -> Tensor:
    """The regulariser: mean share of the sequence a token stays for: y_G + y_Loc segment / L + y_SW W / L, differentiable in y (..., L, 3)."""
    length = y.shape[-2]
    segment = 1 / y[..., GLOBAL].mean(-1, keepdim=True).clamp_min(1 / length)
    return (y[..., GLOBAL] + y[..., LOCAL] * segment / length + y[..., SLIDING] * min(window, length) / length).mean()


@register("nats", kind="module")
class NAtSAttention(nn.Module):
    """x (B, L, dim) -> (y (B, L, dim), expected cache share (scalar)), causal.

    window: W of sliding tokens. tau: temperature of the Gumbel softmax that types are drawn with in training (straight through; the L x L
    mask is written out then); in eval mode types are the argmax and nothing of size L x L exists. Add weight * share to the loss.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, *, window: int = 64, tau: float = 1.0):
        super().__init__()
        self.dim = dim
        if dim % heads or heads % (kv_heads or heads) or window < 0 or tau <= 0:
            raise RegardError(
                f"dim={dim}, heads={heads}, kv_heads={kv_heads}, window={window}, tau={tau}: expected multiples, a window of 0 or more, tau > 0"
            )
        self.heads, self.kv_heads, self.width, self.window, self.tau = heads, kv_heads or heads, dim // heads, window, tau
        self.q, self.out = nn.Linear(dim, dim, False), nn.Linear(dim, dim, False)
        self.k, self.v = (nn.Linear(dim, self.kv_heads * self.width, False) for _ in range(2))
        self.types = nn.Linear(dim, 3 * self.kv_heads)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (-1, self.width)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        return q, k, v, self.types(x).unflatten(-1, (self.kv_heads, 3)).transpose(1, 2)

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, logits = self.heads_of(x)
        group = self.heads // self.kv_heads
        if self.training:
            y = F.gumbel_softmax(logits, self.tau, hard=True)
            k, v, y = (z.repeat_interleave(group, 1) for z in (k, v, y))
            o = surrogate(q, k, v, y, self.window)
        else:
            y = F.one_hot(logits.argmax(-1), 3).to(x.dtype)
            until = type_lifetimes(logits.argmax(-1), self.window).repeat_interleave(group, 1)
            o = attend(q, k, v, MASKED, until=until)
        return self.out(o.transpose(1, 2).flatten(-2)), expected_size(y, self.window)

    @whole
    @takes(x="batch length dim")
    @one_by_one
    def step(self, x: Tensor, cache: NAtSCache | None = None) -> tuple[Tensor, NAtSCache]:
        """New tokens (B, n, dim), types by argmax."""
        cache = cache or NAtSCache([], [], [], [])
        q, k, v, logits = self.heads_of(x)
        o = cache.step(q, k, v, logits.argmax(-1), self.window)
        return self.out(o.transpose(1, 2).flatten(-2)), cache
