"""Predicates of pairs of tokens as attention may follow them: the same word, the same sentence, the neighbour; how much of a head's weight follows
one, and a head's logits held to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError
from ..taps import Reduction, Rows

Predicate = Callable[[Tensor], Tensor]  # ids (B, T) -> (B, T, T) bool: whether token i goes to token j


def matching(ignore: Sequence[int] = (), itself: bool = False) -> Predicate:
    """The same word elsewhere; itself: a token goes to itself too. ignore: ids that go nowhere (special tokens, punctuation)."""

    def pairs(ids: Tensor) -> Tensor:
        same = ids[:, :, None] == ids[:, None]
        if not itself:
            same = same & ~torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        return same & ~torch.isin(ids, torch.tensor(list(ignore), dtype=ids.dtype, device=ids.device))[:, :, None]

    return pairs


def sentences(begin: int, end: int) -> Predicate:
    """The same sentence: the n-th span from a token `begin` to a token `end`, both included."""

    def pairs(ids: Tensor) -> Tensor:
        starts, stops = (ids == begin).cumsum(1), (ids == end).cumsum(1)
        before = torch.nn.functional.pad(stops, (1, 0))[:, :-1]  # ends passed before a token
        inside = starts > before
        return inside[:, :, None] & inside[:, None] & (starts[:, :, None] == starts[:, None])

    return pairs


def contexts(boundary: int, reader: int | None = 0) -> Predicate:
    """The same side of the first token `boundary`, which is on the right; the token at place `reader` (None: none) goes everywhere."""

    def pairs(ids: Tensor) -> Tensor:
        at = ids == boundary
        if not bool(at.any(1).all()):
            raise RegardError(f"a row of ids has no token boundary={boundary}; expected one in every row")
        right = at.cumsum(1) > 0
        found = right[:, :, None] == right[:, None]
        if reader is not None:
            found[:, reader] = True
        return found

    return pairs


def shifted(offset: int) -> Predicate:
    """The tokens 1 .. |offset| places behind (offset > 0) or before (offset < 0)."""
    if offset == 0:
        raise RegardError("offset=0; expected another place than the token's own")

    def pairs(ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        far = (at - at[:, None]) * (1 if offset > 0 else -1)
        return ((far > 0) & (far <= abs(offset))).expand(len(ids), -1, -1)

    return pairs


@dataclass(frozen=True, eq=False)
class PatternMass(Reduction):
    """(B, h): the weight that real queries give to the pairs of `pattern` (B, Lq, Lk), over the number of real queries."""

    pattern: Tensor
    label: str = "pattern"
    by_query = False

    @property
    def name(self) -> str:
        return self.label

    def of(self, part: Rows) -> Tensor:
        pattern = self.pattern.to(part.weights.device)
        if pattern.shape != (len(part.weights), part.q_len, part.weights.shape[-1]):
            raise RegardError(
                f"{self.label} has shape {tuple(pattern.shape)}; expected {(len(part.weights), part.q_len, part.weights.shape[-1])}"
            )
        shown = pattern[:, part.rows]
        return (part.weights * (shown if part.real is None else shown & part.real[:, 0, :, None])[:, None]).sum((2, 3))


def held(logits: Tensor, pattern: Tensor, flat: bool = False) -> Tensor:
    """logits (B, h, T, T) with -inf where pattern (B, T, T) is false; flat: 0 where it is true, so that weights are even. Queries that see nothing
    of the pattern keep all that they see (with flat, evenly)."""
    seen = ~logits.isneginf()
    wanted = seen & pattern[:, None]
    wanted = wanted | (seen & ~wanted.any(-1, keepdim=True))
    kept = torch.zeros_like(logits) if flat else logits
    return kept.masked_fill(~wanted, -torch.inf)
