"""What can be said of attention's weights without holding them: each is fed a few queries at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError


@dataclass(frozen=True)
class Rows:
    """Some queries of a call. weights (B, h, r, Lk), or less where the reduction is `short`: keys that are left out have none; rows (r,): their numbers in the call; places (r,): of the keys at which they stand;
    real (B, 1, r) bool, or None for all: which are no padding; q_len, k_len: queries and keys of the call."""

    weights: Tensor
    rows: Tensor
    places: Tensor
    real: Tensor | None
    q_len: int
    k_len: int


@dataclass(frozen=True)
class Reduction(ABC):
    """Read from `seen[name, layer]`. `of` gives a part for some queries; parts are summed, or stand one after another where `by_query`."""

    by_query = True
    short = False  # whether `of` takes weights without the keys that no query of its part sees

    @property
    def name(self) -> str:
        """What it is called in what was seen: the class's name in snake case."""
        word = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() and at else c.lower() for at, c in enumerate(word))

    @abstractmethod
    def of(self, part: Rows) -> Any:
        """A tensor, or a tuple of tensors, (B, h, r, ...) where `by_query`."""


def whole(name: str, x: Any, least: int = 1) -> None:
    if isinstance(x, bool) or not isinstance(x, int) or x < least:
        raise RegardError(f"{name}={x!r}; expected a whole number of {least} or more")


@dataclass(frozen=True)
class ColumnMass(Reduction):
    """(B, h, Lk): what each key gets, summed over the queries that are no padding."""

    by_query = False
    short = True

    def of(self, part: Rows) -> Tensor:
        mass = part.weights.sum(2) if part.real is None else (part.weights * part.real[..., None]).sum(2)
        return torch.nn.functional.pad(mass, (0, part.k_len - mass.shape[-1]))


@dataclass(frozen=True)
class Mass(Reduction):
    """(B, h, Lq): what each query gives to some keys: numbers of them, or a table (Lk,) or (B, Lk) of bools."""

    keys: Sequence[int] | Tensor
    label: str = "mass"

    def __post_init__(self) -> None:
        if isinstance(self.keys, Tensor) and self.keys.dtype == torch.bool:
            return
        if any(int(x) != x for x in self.keys):
            raise RegardError(f"Mass(keys)={list(self.keys)}; expected whole numbers, or a table of bools")

    @property
    def name(self) -> str:
        return self.label

    def of(self, part: Rows) -> Tensor:
        p, keys = part.weights, self.keys
        if isinstance(keys, Tensor) and keys.dtype == torch.bool:
            table = keys.to(p.device)
            if table.shape[-1] > p.shape[-1] or table.dim() > 2 or (table.dim() == 2 and len(table) not in (1, len(p))):
                raise RegardError(
                    f"Mass(keys) has shape {tuple(table.shape)} and the call {len(p)} rows of {p.shape[-1]} keys; expected (Lk,) or (B, Lk)"
                )
            table = table if table.dim() == 1 else table[:, None, None]
            return (p[..., : table.shape[-1]] * table).sum(-1)
        at = [int(x) for x in keys]
        if any(not -p.shape[-1] <= x < p.shape[-1] for x in at):
            raise RegardError(f"Mass(keys)={at} and the call has {p.shape[-1]} keys; expected numbers of keys")
        return p[..., at].sum(-1)


@dataclass(frozen=True)
class Top(Reduction):
    """(values, keys), each (B, h, Lq, count): the keys with the greatest weights. Calls with fewer keys fill up with weight 0 at key -1."""

    count: int = 1

    def __post_init__(self) -> None:
        whole("Top(count)", self.count)

    def of(self, part: Rows) -> tuple[Tensor, Tensor]:
        p, n = part.weights, min(self.count, part.weights.shape[-1])
        values, keys = p.topk(n, -1)
        more = (0, self.count - n)
        return torch.nn.functional.pad(values, more), torch.nn.functional.pad(keys, more, value=-1)


@dataclass(frozen=True)
class Entropy(Reduction):
    """(B, h, Lq): -sum p log p in nats."""

    short = True

    def of(self, part: Rows) -> Tensor:
        p = part.weights
        return -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)  # whose slope at 0 is 0, as that of keys that are not seen


@dataclass(frozen=True)
class MeanDistance(Reduction):
    """(B, h, Lq): sum_j p_j |i - j|, in tokens."""

    short = True

    def of(self, part: Rows) -> Tensor:
        keys = torch.arange(part.weights.shape[-1], device=part.weights.device)
        return (part.weights * (part.places[:, None] - keys).abs()).sum(-1)


@dataclass(frozen=True)
class Behind(Reduction):
    """(B, h, Lq): what each query gives to the token `back` places before it; 0 where there is none."""

    back: int = 1
    label: str = "behind"

    def __post_init__(self) -> None:
        whole("Behind(back)", self.back, 0)

    @property
    def name(self) -> str:
        return self.label

    def of(self, part: Rows) -> Tensor:
        at = part.places - self.back
        inside = (at >= 0) & (at < part.weights.shape[-1])
        index = at.clamp(0, part.weights.shape[-1] - 1)[:, None].expand(*part.weights.shape[:3], 1)
        return part.weights.gather(3, index)[..., 0] * inside


@dataclass(frozen=True)
class Pooled(Reduction):
    """(B, h, ceil(Lq / block), ceil(Lk / block)): the mean weight in blocks of the map; ragged last blocks are means of what they hold."""

    block: int = 32
    by_query = False

    def __post_init__(self) -> None:
        whole("Pooled(block)", self.block)

    def of(self, part: Rows) -> Tensor:
        p, b, keys = part.weights, self.block, part.weights.shape[-1]
        wide = torch.nn.functional.pad(p, (0, -keys % b)).unflatten(-1, (-1, b)).sum(-1)
        in_key_block = torch.full((wide.shape[-1],), b).index_fill(0, torch.tensor(wide.shape[-1] - 1), keys - (wide.shape[-1] - 1) * b)
        blocks = -(-part.q_len // b)
        in_query_block = torch.full((blocks,), b).index_fill(0, torch.tensor(blocks - 1), part.q_len - (blocks - 1) * b)
        out = wide.new_zeros(*p.shape[:2], blocks, wide.shape[-1]).index_add(2, part.rows // b, wide)
        return out / (in_query_block[:, None] * in_key_block).to(out)


@dataclass(frozen=True)
class Gathered:
    """The parts of a reduction so far."""

    reduction: Reduction
    parts: list[Any]

    def add(self, part: Rows) -> None:
        new = self.reduction.of(part)
        if self.parts and not self.reduction.by_query:
            self.parts[0] = self.parts[0] + new
        else:
            self.parts.append(new)

    def all(self) -> Any:
        if not self.reduction.by_query or len(self.parts) == 1:
            return self.parts[0]
        if isinstance(self.parts[0], tuple):
            return tuple(torch.cat(x, 2) for x in zip(*self.parts, strict=True))
        return torch.cat(self.parts, 2)
