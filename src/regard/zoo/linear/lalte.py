"""Learned token eviction: a window, sinks, and what a small network keeps of the rest, beside linear layers (id 95; He & Garner, 2025).

visible(j) for query i: j <= i and (i - j <= w or j < sinks or r_j > 0),  r = sigmoid(CNN([k; v])) - 1/2, one decision a key head
Not built: a block-sparse kernel for prompts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Kept, Mask, Mechanism, Rope, Sinks, Window
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.engine.reference import repeat_heads
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.compressed_sparse import NSAAttention
from regard.nn.parts import Momentary, takes, whole
from regard.zoo.linear.deltanet import gated_deltanet

MARGIN = 6  # tokens on either side that a decision reads: three convolutions of width 3, dilated by 2


class Router(nn.Module):
    """Keys and values before rotation, (B, Hkv, N, d) each -> keep scores r (B, Hkv, N) in (-1/2, 1/2): three grouped convolutions over time
    and a linear map a head; r starts above zero (bias)."""

    def __init__(self, heads: int, head_dim: int, dropout: float = 0.1, bias: float = 0.5):
        super().__init__()
        widths = [2 * head_dim, head_dim, max(1, head_dim // 2), max(1, head_dim // 4)]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv1d(heads * a, heads * b, 3, padding=2, dilation=2, groups=heads), nn.SiLU(), nn.Dropout(dropout)]
        self.last = nn.Conv1d(heads * widths[-1], heads, 1, groups=heads)
        nn.init.constant_(self.last.bias, bias)  # type: ignore[arg-type]
        self.layers = nn.Sequential(*layers)

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        x = torch.cat((k, v), -1).transpose(-1, -2).flatten(1, 2)
        return torch.sigmoid(self.last(self.layers(x))) - 0.5


class Scored(torch.autograd.Function):
    """v as it is; the score's gradient is that of a factor on v: dr_j = sum_d dv_jd v_jd."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (v,) = ctx.saved_tensors
        return grads[0], (grads[0] * v).sum(-1)


def eviction_mask(window: int, sinks: int) -> Mask:
    """Causal & (last `window` tokens and the query's own | first `sinks` | kept), with the input `kept` (B, H, N) bool."""
    near = Window(window + 1) | Kept()
    return Causal() & (near | Sinks(sinks) if sinks else near)


@dataclass
class EvictionState:
    """recent: raw keys and values of the last window + 2 MARGIN + 1 tokens; sinks: raw ones of the first; past: kept ones, in `budget` places,
    with their scores (-inf: empty) and positions. length: tokens read."""

    k: Tensor
    v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    past_k: Tensor
    past_v: Tensor
    score: Tensor
    place: Tensor
    length: int

    @property
    def bytes(self) -> int:
        return sum(
            x.numel() * x.element_size()
            for x in (self.k, self.v, self.sink_k, self.sink_v, self.past_k, self.past_v, self.score, self.place)
        )


@register("lalte", kind="module")
class LTEAttention(Momentary):
    """x (B, N, dim) -> (B, N, dim), causal, with rotary positions. After a pass `scores` (B, Hkv, N) and `kept` hold the decisions.

    window: w, at least 6, which is how far ahead a decision looks. sinks: first tokens that always stay. budget: places for kept tokens when
    decoding, sinks among them; when full the lowest score goes. `penalty()` is the mean of relu(r) a head, to be weighed by `BudgetController`.
    """

    scores: Tensor
    kept: Tensor

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, window: int = 768, sinks: int = 4, budget: int = 512, dropout: float = 0.1
    ):
        super().__init__()
        self.dim = dim
        kv_heads = kv_heads or heads
        if dim % heads or heads % kv_heads:
            raise RegardError(f"dim={dim}, heads={heads}, kv_heads={kv_heads}: expected multiples")
        if window < MARGIN or sinks < 0 or budget <= sinks:
            raise RegardError(f"window={window}, sinks={sinks}, budget={budget}: expected window >= {MARGIN} and budget > sinks >= 0")
        self.heads, self.kv_heads, self.window, self.sinks, self.budget = heads, kv_heads, window, sinks, budget
        width = dim // heads
        self.q, self.out = nn.Linear(dim, dim, False), nn.Linear(dim, dim, False)
        self.k, self.v = (nn.Linear(dim, kv_heads * width, False) for _ in range(2))
        self.router, self.rope, self.mask = Router(kv_heads, width, dropout), Rope(), eviction_mask(window, sinks)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = [
            layer(x).unflatten(-1, (count, -1)).transpose(1, 2)
            for layer, count in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        ]
        return made[0], made[1], made[2]

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.scores = self.router(k, v)
        self.kept = self.scores > 0
        at = torch.arange(x.shape[1], device=x.device)
        kept = self.kept.repeat_interleave(self.heads // self.kv_heads, 1)
        o = attend(self.rope.rotate(q, at), self.rope.rotate(k, at), Scored.apply(v, self.scores), mask=self.mask, kept=kept)
        return self.out(o.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def penalty(self) -> Tensor:
        """mean relu(r) of the last pass, (Hkv,)."""
        return self.scores.relu().mean((0, 2))

    def start(self, x: Tensor) -> EvictionState:
        b, h, d = len(x), self.kv_heads, self.v.out_features // self.kv_heads
        none, places = x.new_zeros(b, h, 0, d), self.budget - self.sinks
        empty = x.new_zeros(b, h, places, d)
        score = x.new_full((b, h, places), float("-inf"))
        return EvictionState(none, none, none, none, empty, empty, score, torch.zeros_like(score, dtype=torch.long), 0)

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: EvictionState | None = None) -> tuple[Tensor, EvictionState]:
        """New tokens (B, n, dim) after those in `state`, one at a time; equal to `forward` while the budget holds all that is kept."""
        state = self.start(x) if state is None else state
        outs = []
        for t in range(x.shape[1]):
            out, state = self.one(x[:, t : t + 1], state)
            outs.append(out)
        return torch.cat(outs, 1), state

    def one(self, x: Tensor, old: EvictionState) -> tuple[Tensor, EvictionState]:
        q, k, v = self.split(x)
        t, room = old.length, self.window + 2 * MARGIN + 1
        k, v = torch.cat((old.k, k), 2), torch.cat((old.v, v), 2)
        first = t + 1 - k.shape[2]  # the position of the oldest token at hand
        sink_k, sink_v = old.sink_k, old.sink_v
        past = (old.past_k, old.past_v, old.score, old.place)
        gone = t - self.window - 1  # leaves the window now
        if gone >= 0:
            at = gone - first
            if gone < self.sinks:
                sink_k, sink_v = torch.cat((sink_k, k[:, :, at : at + 1]), 2), torch.cat((sink_v, v[:, :, at : at + 1]), 2)
            else:
                past = self.keep(past, k, v, at, gone)
        near = slice(max(0, t - self.window - first), None)
        places = torch.arange(t + 1 - k[:, :, near].shape[2], t + 1, device=x.device)
        keys = [self.rope.rotate(sink_k, torch.arange(sink_k.shape[2], device=x.device)), self.turned(past[0], past[3])]
        all_k = torch.cat((*keys, self.rope.rotate(k[:, :, near], places)), 2)
        all_v = torch.cat((sink_v, past[1], v[:, :, near]), 2)
        real = torch.ones(*all_k.shape[:3], dtype=torch.bool, device=x.device)
        real[:, :, sink_k.shape[2] : sink_k.shape[2] + past[2].shape[2]] = past[2] > float("-inf")
        o = attend(self.rope.rotate(q, torch.tensor([t], device=x.device)), all_k, all_v, mask=repeat_heads(real, self.heads)[:, :, None])
        state = EvictionState(k[:, :, -room:], v[:, :, -room:], sink_k, sink_v, *past, t + 1)
        return self.out(o.transpose(1, 2).flatten(-2)), state

    def turned(self, k: Tensor, place: Tensor) -> Tensor:
        """Keys (B, H, n, d) rotated each by its own position (B, H, n)."""
        flat = self.rope.rotate(k.reshape(1, 1, -1, k.shape[-1]), place.flatten())
        return flat.view_as(k)

    def keep(self, past: tuple[Tensor, ...], k: Tensor, v: Tensor, at: int, place: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The past with the token at index `at` in the place of its lowest score, where its own score is above that and zero."""
        # A slice that begins with the sequence meets the convolutions' own zeros, as in a pass; any other holds MARGIN tokens before `at`.
        low, high = max(0, at - MARGIN), at + MARGIN + 1
        score = self.router(k[:, :, low:high], v[:, :, low:high])[..., at - low]
        past_k, past_v, scores, places = past
        lowest, slot = scores.min(-1)
        taken = ((score > 0) & (score > lowest))[..., None] & F.one_hot(slot, scores.shape[-1]).bool()
        new = [torch.where(taken[..., None], x[:, :, at : at + 1], y) for x, y in ((k, past_k), (v, past_v))]
        return new[0], new[1], torch.where(taken, score[..., None], scores), torch.where(taken, place, places)


class BudgetController:
    """The factor lambda of each head's penalty: every `interval` steps, x 1.5 where an average of the kept count is over the budget, / 2 where
    it is under 0.95 of it; below 1e-9 it is 0 until the budget is exceeded, and never above 1."""

    def __init__(self, heads: int, budget: float, interval: int = 32, start: float = 1e-6, average: float = 0.9):
        self.budget, self.interval, self.average = budget, interval, average
        self.weight, self.count, self.steps = torch.full((heads,), start), torch.zeros(heads), 0

    def update(self, kept: Tensor) -> Tensor:
        """Take a step's decisions (B, heads, N) and return lambda (heads,)."""
        now = kept.float().sum(-1).mean(0)
        self.weight = self.weight.to(now.device)
        self.count = now if self.steps == 0 else self.average * self.count + (1 - self.average) * now
        self.steps += 1
        if self.steps % self.interval == 0:
            over, under = self.count > self.budget, self.count < 0.95 * self.budget
            grown = torch.where(self.weight > 0, 1.5 * self.weight, 1e-9)
            weight = torch.where(over, grown, torch.where(under, self.weight / 2, self.weight))
            self.weight = torch.where(weight < 1e-9, 0.0, weight.clamp_max(1.0))
        return self.weight


def lalte_layers(layers: int, dim: int, heads: int, kind: str = "lalte", **options: Any) -> list[nn.Module | Mechanism]:
    """One mixer a layer for `Decoder(mechanism=...)`: gated DeltaNet in layers 0, 2, ..., and in 1, 3, ... learned eviction ("lalte") or native sparse
    attention ("lansa": `NSAAttention`, which has no step). options: of the latter's layers."""
    if kind not in ("lalte", "lansa"):
        raise RegardError(f"kind={kind!r}; expected lalte or lansa")
    made: list[nn.Module | Mechanism] = []
    for layer in range(layers):
        if layer % 2 == 0:
            made.append(Attention(dim, heads, gated_deltanet()))
        elif kind == "lalte":
            made.append(LTEAttention(dim, heads, **options))
        else:
            made.append(NSAAttention(dim, heads, **{"kv_heads": heads, **options}))
    return made
