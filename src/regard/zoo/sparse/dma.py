"""Dynamic mask attention: a bias read off the values says which w keys a head keeps, for good or until better ones come (Shi et al., 2025).

b_j = A softplus(W vec(v_j));  row i keeps the w largest b_j, j <= i;  p_i = softmax_kept(q_i.k_j / sqrt(D) + b_j)
A small language model and associative recall: `regard compare dma:window=32`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Input, Lifetime, Rope, Weighted
from regard.algebra.blocks import block_sums, lengths
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes, whole


def add(s: Tensor, bias: Tensor) -> Tensor:
    return s + bias


BIASED = Weighted(position=add, mask=Causal() & Lifetime(), inputs=(Input("bias", "bhk"),))
PLAIN = Weighted(position=add, inputs=(Input("bias", "bhk"),))


def kept(until: Tensor) -> Tensor:
    """(B, H, L, L) bool: the keys each row keeps, of lifetimes (B, H, L)."""
    at = torch.arange(until.shape[-1], device=until.device)
    return (until[..., None, :] >= at[:, None]) & (at <= at[:, None])


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


def positive_lifetimes(bias: Tensor) -> Tensor:
    """until (B, H, L) of keys that every later row keeps where their bias is above 0, and none keeps elsewhere."""
    at = torch.arange(bias.shape[-1], device=bias.device)
    return torch.where(bias.detach() > 0, bias.shape[-1], at - 1)


def smoothed(keep: Tensor, block_size: int) -> Tensor:
    """keep (..., L, L) with each row's blocks of keys taken whole where more than half of them are kept, left whole otherwise; later keys stay hidden."""
    length = keep.shape[-1]
    count = lengths(length, block_size, keep.device).to(torch.float32)
    most = block_sums(keep.float(), block_size) > count / 2
    return most.repeat_interleave(block_size, -1)[..., :length] & torch.ones_like(keep[0, 0]).tril()


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

    mask: "topk": a row keeps its `window` largest biases; "relu": every bias above 0, whatever the window. bias: "linear" (A softplus) or "exp"
    (exp(A softplus), as in the paper). rope: rotary positions (base: of the angles). smooth: keys are kept or dropped by blocks of so many,
    by what more than half of them are (0: each by itself); that needs the mask row by row, and `step` refuses it. head_dim: None is dim / heads.
    norm_eps: of the norms of q and k. dt_bias: whether the map of values to biases has one of its own (released: no).
    The bias is shared by the query heads of a group; `step` equals `forward`, and keeps at most `window` keys a kv head ("topk").
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
        mask: str = "topk",
        head_dim: int | None = None,
        base: float = 10000.0,
        norm_eps: float = 1e-6,
        dt_bias: bool = True,
    ):
        super().__init__()
        self.dim = dim
        kv_heads = kv_heads or heads
        if bias not in ("linear", "exp") or mask not in ("topk", "relu") or window < 1 or smooth < 0:
            raise RegardError(
                f"bias={bias!r}, mask={mask!r}, window={window}, smooth={smooth}: expected linear or exp, topk or relu, a positive window "
                "and blocks of 0 or more keys"
            )
        if heads % kv_heads or (head_dim is None and dim % heads):
            raise RegardError(f"dim={dim}, heads={heads}, kv_heads={kv_heads}: expected multiples, or head_dim")
        self.heads, self.kv_heads, self.width = heads, kv_heads, head_dim or dim // heads
        self.window, self.form, self.smooth, self.kind = window, bias, smooth, mask
        self.rope = Rope(base) if rope else None
        self.q, self.out = nn.Linear(dim, heads * self.width, False), nn.Linear(heads * self.width, dim, False)
        self.k, self.v = (nn.Linear(dim, kv_heads * self.width, False) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(self.width, eps=norm_eps) for _ in range(2))
        self.dt = nn.Linear(kv_heads * self.width, kv_heads, dt_bias)
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

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        q, k, v, bias = self.heads_of(x, 0)
        until = top_lifetimes(bias, self.window) if self.kind == "topk" else positive_lifetimes(bias)
        wide, until = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (bias, until))
        if self.smooth:
            o = attend(q, k, v, PLAIN, mask=smoothed(kept(until), self.smooth), bias=wide)
        else:
            o = attend(q, k, v, BIASED, bias=wide, until=until)
        return self.out(o.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: WindowedState | None = None) -> tuple[Tensor, WindowedState]:
        """One or more new tokens (B, n, dim) after those in `state`."""
        if self.smooth:
            raise RegardError(
                f"smooth={self.smooth}: a block's keys are kept or dropped together, tokens to come included; expected 0 to decode"
            )
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
            if self.kind == "topk" and state.bias.shape[-1] > self.window:
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
            seen = None if self.kind == "topk" else (extra > 0)[:, :, None]
            outs.append(attend(q[:, :, new], state.k, state.v, PLAIN, mask=seen, bias=extra))
        assert state is not None
        return self.out(torch.cat(outs, 2).transpose(1, 2).flatten(-2)), state
