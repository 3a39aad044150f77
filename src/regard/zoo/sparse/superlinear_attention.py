"""Superlinear attention: anchors at squares back are searched, spans around the best are read (2026; a patent notice is said to stand on the
authors' model card, so see to it before shipping).

anchors a_i = t - i^2 + 1, s < i <= sqrt(t + 1); the m best of Q1_t.K_{a_i}; span [a - ceil(beta sqrt(t + 1)), a + forward]
O_c = softmax over window and span c of Q2_t.K / sqrt(D);  o_t = sum_c softmax(e)_c O_c
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.algebra import Rope
from regard.algebra.blocks import HIDDEN, heads_of
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes, whole


def anchors_of(t: int, skip: int, power: float = 2.0) -> list[int]:
    """Anchor positions of query t: t - floor(i^power) + 1 for i > skip while they are not negative."""
    found, i = [], skip + 1
    while math.floor(i**power + 1e-9) <= t + 1:
        found.append(t - math.floor(i**power + 1e-9) + 1)
        i += 1
    return found


def window_size(skip: int, power: float = 2.0) -> int:
    """Tokens of the sliding window, the query's own included: up to the first anchor."""
    return max(1, math.floor((skip + 1) ** power + 1e-9) - 1)


def span_of(
    t: int, anchor: int, skip: int, backward: float, forward: float, span_power: float = 0.5, power: float = 2.0
) -> tuple[int, int]:
    """First and last key of an anchor's span, which ends before the window."""
    reach = (t + 1) ** span_power
    return max(0, anchor - math.ceil(backward * reach - 1e-9)), min(
        anchor + math.ceil(forward * reach - 1e-9), t - window_size(skip, power)
    )


def covered(t: int, skip: int, backward: float, forward: float = 0.0) -> set[int]:
    """Keys that the window and all candidate spans of query t reach together."""
    found = set(range(max(0, t - window_size(skip) + 1), t + 1))
    for anchor in anchors_of(t, skip):
        start, end = span_of(t, anchor, skip, backward, forward)
        found |= set(range(start, end + 1))
    return found


def span_search(q: Tensor, k: Tensor, first: int, top: int, skip: int, power: float = 2.0) -> tuple[Tensor, Tensor]:
    """(anchors (B, H, n, top), scores): the best anchors of search queries q (B, H, n, D) at positions first ..; invalid ones score -1e9."""
    rows = [anchors_of(first + n, skip, power) for n in range(q.shape[2])]
    width = max(top, *(len(row) for row in rows)) if rows else top
    table = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long, device=q.device)
    scores = torch.empty(*q.shape[:3], width, dtype=q.dtype, device=q.device)
    for at in range(0, q.shape[2], 256):  # gathered keys of 256 queries at a time
        part = table[at : at + 256]
        scores[:, :, at : at + 256] = torch.einsum("bhnd,bhnwd->bhnw", q[:, :, at : at + 256], k[:, :, part.clamp(min=0)])
    scores = torch.where(table >= 0, scores, -1e9)
    best = scores.topk(top, -1)
    return table.expand(*scores.shape).gather(-1, best.indices), best.values


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchors: Tensor,
    scores: Tensor,
    first: int,
    skip: int,
    backward: float,
    forward: float,
    span_power: float,
    power: float,
) -> Tensor:
    """sum_c softmax(scores)_c O_c for queries q (B, H, n, D) at positions first ..; window and span share one softmax each c."""
    n, device = q.shape[2], q.device
    t = torch.arange(first, first + n, device=device)
    reach = (t + 1).double() ** span_power
    back, ahead = torch.ceil(backward * reach - 1e-9).long(), torch.ceil(forward * reach - 1e-9).long()
    size = window_size(skip, power)
    valid = anchors >= 0
    start = (anchors - back[:, None]).clamp(min=0)
    end = torch.minimum(anchors + ahead[:, None], (t - size)[:, None])
    width = int((back + ahead + 1).max())
    near = t[:, None] - torch.arange(size - 1, -1, -1, device=device)
    scale = q.shape[-1] ** -0.5

    def part(place: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised (out, mass, maximum) over gathered keys; place (n, w) for all heads, or (B, H, n, w)."""
        at = place.clamp(0, k.shape[2] - 1)
        if at.dim() == 2:
            keys, values = k[:, :, at], v[:, :, at]
        else:
            b = torch.arange(at.shape[0], device=device)[:, None, None, None]
            h = torch.arange(at.shape[1], device=device)[None, :, None, None]
            keys, values = k[b, h, at], v[b, h, at]
        s = (torch.einsum("bhnd,bhnwd->bhnw", q, keys) * scale).masked_fill(~seen, HIDDEN)
        top = s.amax(-1, keepdim=True)
        w = torch.exp(s - torch.where(top.isfinite(), top, 0.0))
        return torch.einsum("bhnw,bhnwd->bhnd", w, values), w.sum(-1, keepdim=True), top

    window = part(near, near >= 0)
    gates, out = torch.where(valid, scores, -1e9).softmax(-1), torch.zeros_like(window[0])
    for c in range(anchors.shape[-1]):
        place = start[..., c : c + 1] + torch.arange(width, device=device)
        span = part(place, (place <= end[..., c : c + 1]) & valid[..., c : c + 1])
        top = torch.maximum(window[2], span[2])
        fades = [torch.exp(x[2] - top) for x in (window, span)]
        joined = sum(x[0] * f for x, f in zip((window, span), fades, strict=True)) / sum(
            x[1] * f for x, f in zip((window, span), fades, strict=True)
        )
        out = out + gates[..., c : c + 1] * joined
    return out


@register("superlinear-attention", kind="module")
class SuperlinearAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), causal, O(L^1.5) (power 2; power p searches L^(1/p) anchors).

    top: m spans read. skip: s; the window holds (s + 1)^p - 1 tokens. backward, forward: beta and phi. span_power: spans grow with (t + 1)^it.
    From backward = 2 on every key is in reach of some anchor. `step` reads O(sqrt L) keys a token from a cache of all.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, *, top: int = 2, skip: int = 3, backward: float = 2.0, forward: float = 0.0,
        power: float = 2.0, span_power: float = 0.5, rope: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.dim = dim
        if top < 1 or skip < 0 or backward < 0 or forward < 0 or power < 1:
            raise RegardError(
                f"top={top}, skip={skip}, backward={backward}, forward={forward}, power={power}: expected top >= 1, power >= 1, the others >= 0"
            )
        kv_heads = kv_heads or heads
        if dim % heads or heads % kv_heads:
            raise RegardError(f"dim={dim}, heads={heads}, kv_heads={kv_heads}: expected multiples")
        self.heads, self.kv_heads, self.top, self.skip, self.power = heads, kv_heads, top, skip, power
        self.spans = (backward, forward, span_power)
        width = dim // heads
        self.search, self.q, self.out = (nn.Linear(dim, dim, False) for _ in range(3))
        self.k, self.v = (nn.Linear(dim, kv_heads * width, False) for _ in range(2))
        self.rope = Rope() if rope else None

    def split(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Search queries, queries, keys and values by heads."""
        made = [layer(x).unflatten(-1, (-1, x.shape[-1] // self.heads)).transpose(1, 2) for layer in (self.search, self.q, self.k, self.v)]
        at = torch.arange(first, first + x.shape[1], device=x.device)
        turned = [y if self.rope is None else self.rope.rotate(y, at) for y in made[:3]]
        return turned[0], turned[1], turned[2], made[3]

    def mixed(self, search: Tensor, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        k, v, outs = heads_of(k, self.heads), heads_of(v, self.heads), []
        for start in range(0, q.shape[2], 256):
            rows = slice(start, start + 256)
            anchors, scores = span_search(search[:, :, rows], k, first + start, self.top, self.skip, self.power)
            outs.append(span_attention(q[:, :, rows], k, v, anchors, scores, first + start, self.skip, *self.spans, self.power))
        return self.out(torch.cat(outs, 2).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(*self.split(x, 0), 0)

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """New tokens (B, n, dim) after the keys and values of `state`."""
        first = 0 if state is None else state[0].shape[2]
        search, q, k, v = self.split(x, first)
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        return self.mixed(search, q, k, v, first), (k, v)
