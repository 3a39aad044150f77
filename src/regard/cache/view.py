"""An attention call as policies see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import KeptLayer, Part

ROWS = 256  # queries whose weights are looked at together


@dataclass
class View:
    """An attention call as a policy sees it, after it was computed: the last tokens' queries over what one part remembers.

    layer: its number, of `layers`; first: whether this is the prompt's call. query (B, h, group, n, D): of the query heads of each key head of `part`.
    memory: what the policy keeps of each row from call to call, (B, ...) each. step: weights of a single query, where they were looked at already.
    """

    layer: int
    layers: int
    first: bool
    prompt: int
    part: Part
    query: Tensor
    scale: float
    window: int | None
    memory: dict[str, Tensor] = field(default_factory=dict)
    step: Tensor | None = None

    @property
    def length(self) -> int:
        return self.part.places.shape[2]

    def rows(self, last: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights (B, h, group, r, length) in float32 of the last queries (None: all), some at a time, and their places (r,)."""
        for p, places in self.blocks(last):
            yield F.pad(p, (0, self.length - p.shape[-1])) if p.shape[-1] < self.length else p, places

    def mass(self, last: int | None = None) -> Tensor:
        """(B, h, length): the weights that entries get, summed over the last queries (None: all) and the heads of a group."""
        if self.query.shape[3] == 1 and self.step is not None:
            return self.step.sum((2, 3))
        total: Any = 0.0
        for p, _ in self.blocks(last):
            total = p.sum((2, 3)) + (F.pad(total, (0, p.shape[-1] - total.shape[-1])) if isinstance(total, Tensor) else total)
        return F.pad(total, (0, self.length - total.shape[-1]))

    def blocks(self, last: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """As `rows`, without entries that all stand behind a block's queries."""
        n = self.query.shape[3]
        if n == 1 and self.step is not None:
            yield self.step, self.part.places[0, 0, -1:]
            return
        keys, plain = self.part.keys.float(), self.part.everything() and self.window is None
        end = int(self.part.places.max()) + 1 if self.length else 0
        for at in range(0 if last is None else max(0, n - last), n, ROWS):
            q = self.query[:, :, :, at : at + ROWS].float()
            places = torch.arange(end - n + at, end - n + at + q.shape[3], device=q.device)
            if plain and self.length == n:  # a prompt: entry j is token j
                stop = at + q.shape[3]
                s = torch.einsum("bhgnd,bhmd->bhgnm", q * self.scale, keys[:, :, :stop])
                hidden = torch.ones(q.shape[3], q.shape[3], dtype=torch.bool, device=q.device).triu(1)
                s[..., at:].masked_fill_(hidden, -torch.inf)
                yield s.softmax(-1), places
                continue
            s = torch.einsum("bhgnd,bhmd->bhgnm", q, keys) * self.scale
            shown = visible(self.part, places, self.window)
            p = s.masked_fill(~shown[:, :, None], torch.finfo(s.dtype).min).softmax(-1)
            yield torch.where(shown[:, :, None] & self.real(places)[:, None, None, :, None], p, 0.0), places

    def look(self, part: Part, places: Tensor) -> Tensor:
        """Attention of a single query over `part`, (B, h, group, 1, Dv), whose weights are kept for `rows`."""
        k, v = part.keys, part.values
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        s = (self.query[:, :, :, 0].to(dtype) * self.scale) @ k.to(dtype).mT
        if self.window is None and part.everything():
            p = s.softmax(-1)
            self.step = p.unsqueeze(3)
        else:
            shown = visible(part, places, self.window)
            p = s.masked_fill(~shown, torch.finfo(s.dtype).min).softmax(-1)
            self.step = torch.where(shown & part.alive[:, :, None, -1:], p, 0.0).unsqueeze(3)
        return (p.to(v.dtype) @ v).unsqueeze(3)

    def real(self, places: Tensor) -> Tensor:
        """(B, r): queries that are no padding."""
        own = self.part.places[:, :, None] == places[:, None]
        return (own & self.part.alive[:, :, None]).any(-1)[:, 0]


def visible(part: Part, places: Tensor, window: int | None) -> Tensor:
    """(B, h, n, m): which entries the queries at places (n,) see."""
    keys = part.places[:, :, None]
    shown = part.alive[:, :, None] & (keys <= places[:, None])
    return shown if window is None else shown & (places[:, None] - keys < window)


def read(q: Tensor, part: Part, places: Tensor, scale: float, window: int | None, only: Tensor | None = None) -> Tensor:
    """Attention of q (B, h, group, n, D) over a part, (B, h, group, n, Dv); only (B, h, n, m) bool: of what is visible, these."""
    n, m, group = q.shape[3], part.places.shape[2], q.shape[2]
    k, v = part.keys, part.values
    whole = only is None and (window is None or int(places[-1]) < window) and part.everything()
    if n == 1:  # the query heads of a key head as its queries: keys are read once
        shown = None
        if not whole:
            shown = part.alive[:, :, None] if window is None else visible(part, places, window)
            shown = shown if only is None else shown & only
            shown = shown | ~shown.any(-1, keepdim=True)  # padding reads something, for its output is nobody's
        return F.scaled_dot_product_attention(q[:, :, :, 0], k, v, attn_mask=shown, scale=scale).unsqueeze(3)
    if whole and n == m:
        o = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=group > 1)
        return o.unflatten(1, (-1, group))
    shown = visible(part, places, window)
    shown = shown if only is None else shown & only
    shown = (shown | ~shown.any(-1, keepdim=True)).repeat_interleave(group, 1)
    o = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, attn_mask=shown, scale=scale, enable_gqa=group > 1)
    return o.unflatten(1, (-1, group))


class Watcher(Protocol):
    """What a session asks of a policy."""

    @property
    def whole_prompts(self) -> bool: ...

    def begin(self, layers: int, heads: int) -> None: ...

    def compute(self, view: View, places: Tensor) -> Tensor: ...

    def run(self, layer: KeptLayer, number: int, view: View) -> None: ...
