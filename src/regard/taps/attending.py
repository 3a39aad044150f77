"""One attention call as taps see it: q, k, v, what is computed of them fused, and the same in the open for the heads and queries asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine.weights import drop
from ..errors import RegardError

PIECE = 64  # queries whose weights are computed together: fewer read the keys more often, more compute more behind the diagonal

Fused = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Attending(ABC):
    """q (B, H, Lq, D), k, v (B, Hkv, Lk, D). fused: (q, k, v) -> per-head outputs (B, H, Lq, Dv), and weights where the host asked for
    them. dropout: of the weights."""

    query: Tensor
    key: Tensor
    value: Tensor
    fused: Fused
    dropout: float

    @property
    def stepped(self) -> bool:
        """Whether the call runs outside the modules around it, whose points are then not passed."""
        return False

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def k_len(self) -> int:
        return self.key.shape[2]

    def with_heads(self, query: Tensor, key: Tensor, value: Tensor) -> Attending:
        return replace(self, query=query, key=key, value=value)

    def shared(self, heads: Tensor) -> Tensor:
        """The key heads that query heads (h,) read."""
        return heads // (self.heads // self.key.shape[1])

    def outputs(self, weights: Tensor, heads: Tensor) -> Tensor:
        """Weights (B, h, r, Lk) of some heads, after dropout, times their values: (B, h, r, Dv)."""
        with torch.autocast(weights.device.type, enabled=False):
            return drop(weights, self.value.index_select(1, self.shared(heads)), self.dropout)[0]

    @abstractmethod
    def logits(self, heads: Tensor, rows: Tensor) -> Tensor:
        """What the softmax of query heads (h,) at queries (r,) takes, (B, h, r, Lk) in at least float32; -inf where nothing is seen."""

    @abstractmethod
    def weights(self, heads: Tensor, rows: Tensor, logits: Tensor | None = None) -> Tensor:
        """Weights (B, h, r, Lk) in at least float32, of these logits where they are given; zeros where a query sees no key."""

    def seen(self, heads: Tensor, rows: Tensor) -> Tensor:
        """The same, (B, h, r, n): keys behind the n-th have no weight for any of these queries."""
        return self.weights(heads, rows)


@dataclass(frozen=True)
class Terms:
    """What a softmax call adds to q and k. shown (B or 1, H or 1, Lq, Lk) bool: visible pairs, or None. first: the key at which the first
    query stands under causality alone, or None. bias: as shown in shape. k_len: keys that count. sinks (B or 1, H, Lq or 1, 1): one more
    logit a row."""

    scale: float
    k_len: int
    shown: Tensor | None = None
    first: int | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def every(index: Tensor, count: int) -> bool:
    """Whether an index is all numbers below `count`, in order."""
    return len(index) == count and bool((index == torch.arange(count, device=index.device)).all())


def part(x: Tensor, heads: Tensor, rows: Tensor) -> Tensor:
    """x (B, H or 1, Lq or 1, n) at heads and rows."""
    x = x if x.shape[1] == 1 else x.index_select(1, heads)
    return x if x.shape[2] == 1 else x.index_select(2, rows)


@dataclass(frozen=True)
class Softmax(Attending):
    """A call of softmax attention. terms: found when they are needed."""

    terms: Callable[[], Terms]

    def logits(self, heads: Tensor, rows: Tensor) -> Tensor:
        terms = self.terms()
        with torch.autocast(self.query.device.type, enabled=False):
            whole = every(heads, self.heads) and every(rows, self.q_len)
            q = self.query if whole else self.query.index_select(1, heads).index_select(2, rows)
            k = self.key[:, :, : terms.k_len].index_select(1, self.shared(heads))
            wide = torch.promote_types(q.dtype, torch.float32)
            s = (q.to(wide) * terms.scale) @ k.to(wide).transpose(-1, -2)
            if terms.softcap is not None:
                s = terms.softcap * torch.tanh(s / terms.softcap)
            if terms.bias is not None:
                s = s + part(terms.bias, heads, rows)
            hidden = None
            if terms.shown is not None:
                hidden = ~part(terms.shown, heads, rows)
            elif terms.first is not None:
                hidden = torch.arange(terms.k_len, device=s.device) > (terms.first + rows)[:, None]
            if hidden is not None:  # the scores are this call's own: where no graph holds them, they need no copy
                s = s.masked_fill(hidden, -torch.inf) if s.requires_grad else s.masked_fill_(hidden, -torch.inf)
            more = self.k_len - terms.k_len
            return s if more == 0 else torch.nn.functional.pad(s, (0, more), value=-torch.inf)

    def weights(self, heads: Tensor, rows: Tensor, logits: Tensor | None = None) -> Tensor:
        if logits is None and self.triangular:
            wide = torch.promote_types(self.query.dtype, torch.float32)
            out = self.query.new_zeros(len(self.query), len(heads), len(rows), self.k_len, dtype=wide)
            for place, some in zip(out.split(PIECE, 2), rows.split(PIECE), strict=True):
                p = self.seen(heads, some)
                place[..., : p.shape[-1]] = p
            return out
        return self.normalised(self.logits(heads, rows) if logits is None else logits, heads, rows, own=logits is None)

    def normalised(self, s: Tensor, heads: Tensor, rows: Tensor, own: bool) -> Tensor:
        """Softmax of logits, which it may overwrite where they are its own."""
        sinks = self.terms().sinks
        if sinks is not None:
            more = part(sinks.to(s.dtype), heads, rows).expand(*s.shape[:3], 1)
            return torch.cat((s, more), -1).softmax(-1)[..., :-1]
        blind = s.amax(-1, keepdim=True).isneginf()
        if s.device.type == "cpu" and not bool(blind.any()):
            return torch.softmax(s, -1, out=s) if own and not s.requires_grad else s.softmax(-1)
        return torch.where(blind, 0.0, torch.where(blind, 0.0, s).softmax(-1))

    @property
    def triangular(self) -> bool:
        """Whether the call is causal and nothing else, with no graph to keep: what lies behind the diagonal is then not computed."""
        terms = self.terms()
        bare = terms.bias is None and terms.softcap is None and terms.sinks is None and terms.shown is None
        return bare and terms.first is not None and terms.first >= 0 and not (self.query.requires_grad or self.key.requires_grad)

    def seen(self, heads: Tensor, rows: Tensor) -> Tensor:
        """Under causality alone only the keys before the last of these queries are looked at, and no head's keys are copied."""
        if not self.triangular:
            return self.weights(heads, rows)
        terms = self.terms()
        assert terms.first is not None
        first, last = terms.first + int(rows.min()), terms.first + int(rows.max())
        q, k = self.query.index_select(2, rows), self.key[:, :, : last + 1]
        if not every(heads, self.heads):
            q, k = q.index_select(1, heads), k.index_select(1, self.shared(heads))
        with torch.autocast(self.query.device.type, enabled=False):
            wide = torch.promote_types(self.query.dtype, torch.float32)
            q = (q.to(wide) * terms.scale).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
            s = (q @ k.to(wide).mT).unflatten(2, (-1, len(rows))).flatten(1, 2)
            later = torch.arange(first, last + 1, device=s.device) > (terms.first + rows)[:, None]
            s[..., first:].masked_fill_(later, -torch.inf)
            return self.normalised(s, heads, rows, own=True)


@dataclass(frozen=True)
class Given(Attending):
    """A call of another mechanism. matrix: (q, k, v) -> its weights (B, H, Lq, Lk), or None where it has no such matrix."""

    name: str
    matrix: Callable[[Tensor, Tensor, Tensor], Tensor | None]

    def logits(self, heads: Tensor, rows: Tensor) -> Tensor:
        raise RegardError(f"{self.name} is not plain softmax attention, so that it has no logits to tap; expected the point 'weights'")

    def weights(self, heads: Tensor, rows: Tensor, logits: Tensor | None = None) -> Tensor:
        found = self.matrix(self.query, self.key, self.value)
        if found is None:
            raise RegardError(f"{self.name} has no matrix of weights to tap; expected the points q, k, v, heads, out, residual or mlp")
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found.index_select(1, heads).index_select(2, rows)
