"""Dynamic mask attention: a bias read off the values says which w keys a head keeps, for good or until better ones come (Shi et al., 2025).

b_j = A softplus(W vec(v_j));  row i keeps the w largest b_j, j <= i;  p_i = softmax_kept(q_i.k_j / sqrt(D) + b_j)
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Causal, Input, Lifetime, Rope, Weighted
from ..catalog.registry import register
from ..engine import attend
from ..errors import RegardError
from .parts import head_norm


def add(s: Tensor, bias: Tensor) -> Tensor:
    return s + bias


BIASED = Weighted(position=add, mask=Causal() & Lifetime(), inputs=(Input("bias", "bhk"),))


def top_lifetimes(bias: Tensor, window: int) -> Tensor:
    """until (B, H, L): the last row that still has key j among the `window` largest biases so far; j - 1 when it never is.

    A key that has left can never come back, so one pass with a heap a head finds it; of equal biases the earlier stays.
    """
    length = bias.shape[-1]
    until = torch.full(bias.shape, length, dtype=torch.long)
    for row, out in zip(bias.detach().flatten(0, -2).tolist(), until.flatten(0, -2), strict=True):
        heap: list[tuple[float, int]] = []
        for i, b in enumerate(row):
            if len(heap) < window:
                heapq.heappush(heap, (b, -i))
            else:
                out[-heapq.heappushpop(heap, (b, -i))[1]] = i - 1
    return until.to(bias.device)


def smoothed(keep: Tensor, block_size: int) -> Tensor:
    """Blocks of keys of which more than half are kept, (..., L) bool."""
    padded = F.pad(keep.float(), (0, -keep.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    return (padded.mean(-1) > 0.5).repeat_interleave(block_size, -1)[..., : keep.shape[-1]]


@dataclass
class WindowedState:
    """The w best keys of each kv head: k, v (B, Hkv, n, D), their biases and places (B, Hkv, n), and how many tokens were read."""

    k: Tensor
    v: Tensor
    bias: Tensor
    place: Tensor
    length: int

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.bias))


@register("dma", kind="module")
class DynamicMaskAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), causal.

    window: keys a row keeps. bias: "linear" (A softplus) or "exp" (exp(A softplus), as in the paper). rope: rotary positions.
    smooth: also drop kept keys of a block of so many, unless more than half of it is kept (0: no); it needs the mask row by row.
    The bias is shared by the query heads of a group; `step` keeps at most `window` keys a kv head and equals `forward`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        window: int = 2048,
        bias: str = "linear",
        rope: bool = True,
        smooth: int = 0,
    ):
        super().__init__()
        if bias not in ("linear", "exp"):
            raise RegardError(f"bias={bias!r}; expected linear or exp")
        kv_heads = kv_heads or heads
        self.heads, self.kv_heads, self.width, self.window, self.form, self.smooth = heads, kv_heads, dim // heads, window, bias, smooth
        self.rope = Rope() if rope else None
        self.q, self.out = nn.Linear(dim, dim, False), nn.Linear(dim, dim, False)
        self.k, self.v = (nn.Linear(dim, kv_heads * self.width, False) for _ in range(2))
        self.q_norm, self.k_norm = head_norm("rms", self.width), head_norm("rms", self.width)
        self.dt = nn.Linear(kv_heads * self.width, kv_heads)
        self.strength = nn.Parameter(torch.zeros(kv_heads))

    def heads_of(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v by heads and the bias (B, Hkv, L)."""
        q, k, v = (y.unflatten(-1, (-1, self.width)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            at = torch.arange(first, first + x.shape[1], device=x.device)
            q, k = self.rope.rotate(q, at), self.rope.rotate(k, at)
        bias = F.softplus(self.dt(v.transpose(1, 2).flatten(-2))).transpose(1, 2) * self.strength[:, None]
        return q, k, v, bias.exp() if self.form == "exp" else bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, bias = self.heads_of(x, 0)
        until, wide = top_lifetimes(bias, self.window), bias.repeat_interleave(self.heads // self.kv_heads, 1)
        until = until.repeat_interleave(self.heads // self.kv_heads, 1)
        mask = None
        if self.smooth:
            at = torch.arange(x.shape[1], device=x.device)
            keep = (until[:, :, None] >= at[:, None]) & (at <= at[:, None])
            mask = smoothed(keep, self.smooth) & keep
        o = attend(q, k, v, BIASED, mask=mask, bias=wide, until=until)
        return self.out(o.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def step(self, x: Tensor, state: WindowedState | None = None) -> tuple[Tensor, WindowedState]:
        """One or more new tokens (B, n, dim) after those in `state`."""
        first = 0 if state is None else state.length
        q, k, v, bias = self.heads_of(x, first)
        outs = []
        for t in range(x.shape[1]):
            new = slice(t, t + 1)
            place = torch.full_like(bias[..., new], first + t, dtype=torch.long)
            if state is None:
                state = WindowedState(k[:, :, new], v[:, :, new], bias[..., new], place, first + t + 1)
            else:
                state = WindowedState(
                    torch.cat((state.k, k[:, :, new]), 2),
                    torch.cat((state.v, v[:, :, new]), 2),
                    torch.cat((state.bias, bias[..., new]), 2),
                    torch.cat((state.place, place), 2),
                    first + t + 1,
                )
            if state.bias.shape[-1] > self.window:
                # entries are in order of place, so the last of the smallest is the latest
                last = state.bias.shape[-1] - 1 - state.bias.flip(-1).argmin(-1, keepdim=True)
                rest = torch.arange(state.bias.shape[-1] - 1, device=x.device)
                index = rest + (rest >= last).long()
                wide = index[..., None]
                state = WindowedState(
                    state.k.gather(2, wide.expand(*index.shape, self.width)),
                    state.v.gather(2, wide.expand(*index.shape, self.width)),
                    state.bias.gather(2, index),
                    state.place.gather(2, index),
                    state.length,
                )
            extra = state.bias.repeat_interleave(self.heads // self.kv_heads, 1)
            outs.append(attend(q[:, :, new], state.k, state.v, Weighted(position=add, inputs=(Input("bias", "bhk"),)), bias=extra))
        assert state is not None
        return self.out(torch.cat(outs, 2).transpose(1, 2).flatten(-2)), state
