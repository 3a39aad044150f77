"""Which blocks of the Lq x Lk plane are empty, partial or full, found without building the plane."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.mask import Both, Either, Mask, PerHead, Without
from ..algebra.part import Sizes
from ..algebra.select import Selection
from ..algebra.snapshot import remembered, untraced
from .pairs import indices, looked_at, visible

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Layout:
    """kind (B or 1, H or 1, query blocks, key blocks): EMPTY, PARTIAL or FULL. Blocks count from the first query and key."""

    kind: Tensor
    block_q: int
    block_k: int
    _lists: dict[bool, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def density(self) -> float:
        """Share of blocks that hold a visible pair."""
        with untraced():
            return float((self.kind > 0).float().mean())

    @functools.cached_property
    def shared(self) -> bool:
        """Whether all batches and heads have the same blocks."""
        return self.kind.shape[0] == 1 and self.kind.shape[1] == 1

    def joined(self) -> Layout:
        """One layout for all batches and heads where theirs differ little: looking at a few empty blocks costs less than going
        through heads one by one."""
        some, full = (self.kind > 0).flatten(0, 1), (self.kind == FULL).flatten(0, 1)
        union = some.any(0)
        if self.shared or float(union.float().mean()) > 1.5 * self.density:
            return self
        kind = union.to(torch.uint8) + (union & full.all(0)).to(torch.uint8)
        return Layout(kind[None, None], self.block_q, self.block_k)

    @functools.cached_property
    def rows(self) -> list[list[list[list[int]]]]:
        with untraced():
            return self.kind.tolist()

    def lists(self, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """For each row (or column) of blocks, the entries to visit: 2 * block + (1 if full), visible ones first; and how many."""
        if transposed not in self._lists:
            kind = (self.kind.transpose(-1, -2) if transposed else self.kind).contiguous()
            entry = 2 * torch.arange(kind.shape[-1], device=kind.device) + (kind == FULL)
            order = torch.sort((kind == EMPTY).to(torch.int8), dim=-1, stable=True).indices
            entries = entry.expand(kind.shape).gather(-1, order).to(torch.int32).contiguous()
            self._lists[transposed] = entries, (kind > 0).sum(-1).to(torch.int32).contiguous()
        return self._lists[transposed]


def block_bounds(length: int, block: int, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    start = torch.arange(0, length, block, device=device)
    return start + first, (start + block).clamp(max=length) - 1 + first


def some_and_every(
    mask: Mask, sizes: Sizes, block_q: int, block_k: int, inputs: Mapping[str, Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(any pair visible, all pairs visible) of each block; masks without closed bounds are looked at a row of blocks at a time."""
    if isinstance(mask, (Both, Either)):
        some_a, every_a = some_and_every(mask.left, sizes, block_q, block_k, inputs, device)
        some_b, every_b = some_and_every(mask.right, sizes, block_q, block_k, inputs, device)
        return (some_a & some_b, every_a & every_b) if isinstance(mask, Both) else (some_a | some_b, every_a | every_b)
    if isinstance(mask, Without):
        some, every = some_and_every(mask.mask, sizes, block_q, block_k, inputs, device)
        return ~every, ~some
    if isinstance(mask, PerHead):
        each = [some_and_every(inner, sizes, block_q, block_k, inputs, device) for inner in mask.masks]
        turns = [each[head % len(each)] for head in range(sizes.heads)]
        own = [tuple(x if x.shape[1] == 1 else x[:, head : head + 1] for x in turn) for head, turn in enumerate(turns)]
        rows = max(some.shape[0] for some, _ in own)
        some, every = (torch.cat([x.expand(rows, *x.shape[1:]) for x in xs], 1) for xs in zip(*own, strict=True))
        return some, every
    i0, i1 = block_bounds(sizes.q_len, block_q, sizes.k_len - sizes.q_len, device)
    j0, j1 = block_bounds(sizes.k_len, block_k, 0, device)
    bounds = mask.bounds_of(inputs, i0[:, None], i1[:, None], j0, j1)
    if bounds is not None:
        some, every = (x[(None,) * (4 - x.dim())] for x in bounds)
        shape = (i0.numel(), j0.numel())
        return some.expand(*some.shape[:2], *shape), every.expand(*every.shape[:2], *shape)
    at = indices(sizes, device)
    env = {**inputs, "offset": sizes.k_len - sizes.q_len, "k_len": sizes.k_len}
    b, h = looked_at(mask, at, env)
    pad = -sizes.k_len % block_k
    some_rows: list[Tensor] = []
    every_rows: list[Tensor] = []
    for rows in at["i"].split(block_q):
        seen = visible(mask, b, h, rows, at["j"], env).expand(b.numel(), h.numel(), rows.shape[0], sizes.k_len)
        for into, fill, reduce in ((some_rows, False, torch.Tensor.any), (every_rows, True, torch.Tensor.all)):
            padded = torch.nn.functional.pad(seen, (0, pad), value=fill).unflatten(-1, (-1, block_k))
            into.append(reduce(reduce(padded, -1), -2))
    return torch.stack(some_rows, -2), torch.stack(every_rows, -2)


def layout(
    mask: Mask,
    sizes: Sizes,
    block_q: int,
    block_k: int,
    inputs: Mapping[str, Tensor],
    device: torch.device,
    selection: Selection | None = None,
) -> Layout:
    """The blocks of a mask, and of a selection within it (whose block sizes must divide or equal the given ones)."""
    some, every = some_and_every(mask, sizes, block_q, block_k, inputs, device)
    kind = some.to(torch.uint8) + (some & every).to(torch.uint8)
    if selection is not None:
        kept, whole = reblock(selection, sizes, block_q, block_k)
        kind = torch.where(kept, torch.where(whole, kind, kind.clamp(max=PARTIAL)), EMPTY)
    return Layout(kind, block_q, block_k)


@remembered(maxsize=128)
def static_layout(mask: Mask, sizes: Sizes, block_q: int, block_k: int, device: torch.device) -> Layout:
    """`layout` of a mask that reads no tensor, remembered."""
    return layout(mask, sizes, block_q, block_k, {}, device)


def reblock(selection: Selection, sizes: Sizes, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """A selection's blocks in other block sizes: (some of it kept, all of it kept)."""
    some = every = selection.keep
    for dim, length, have, want in ((-2, sizes.q_len, selection.block_q, block_q), (-1, sizes.k_len, selection.block_k, block_k)):
        if have == want:
            continue
        block = torch.arange(0, length, want, device=some.device)
        first, last = block // have, ((block + want).clamp(max=length) - 1) // have
        if int((last - first).max()) == 0:
            some, every = some.index_select(dim, first), every.index_select(dim, first)
        else:
            running = torch.nn.functional.pad(some.movedim(dim, -1).long().cumsum(-1), (1, 0))
            count = running[..., last + 1] - running[..., first]
            running_every = torch.nn.functional.pad(every.movedim(dim, -1).long().cumsum(-1), (1, 0))
            whole = running_every[..., last + 1] - running_every[..., first] == last - first + 1
            some, every = (count > 0).movedim(-1, dim), whole.movedim(-1, dim)
    return some, every


Index = slice | Tensor


@dataclass(frozen=True, eq=False)
class Columns:
    """Some keys of a tile: a slice, an index tensor, or an index tensor a head (n, count). The first `full` are visible to every query; the rest must be looked at."""

    index: Index
    count: int
    full: int
    exists: Tensor | None = None  # of an index a head (n, count): False where a head has fewer keys than the others
    stand_ins: bool = False  # keys that do not exist are copies of visible ones, and all others are visible: weigh them 0, no more


def columns_of(row: list[int], block_k: int, k_len: int, limit: int, device: torch.device, whole: bool = False) -> Iterator[Columns]:
    """The keys a row of blocks reads, in pieces of at most `limit`; `whole`: one piece, however long.

    In each piece fully visible keys come first, so that predicates are evaluated only where they decide something.
    """
    runs: list[list[int]] = []  # start, end of full part, stop
    for block, kind in enumerate(row):
        if not kind:
            continue
        start, stop = block * block_k, min((block + 1) * block_k, k_len)
        joins = bool(runs) and runs[-1][2] == start
        if joins and (kind == PARTIAL or runs[-1][1] == start or whole):
            runs[-1][1] = stop if kind == FULL and runs[-1][1] == start else runs[-1][1]
            runs[-1][2] = stop
        else:
            runs.append([start, stop if kind == FULL else start, stop])
    total = sum(stop - start for start, _, stop in runs)
    if len(runs) > 1 and (whole or total < 512 * len(runs)):
        full = [torch.arange(start, end, device=device) for start, end, _ in runs if end > start]
        rest = [torch.arange(end, stop, device=device) for _, end, stop in runs if stop > end]
        index, known = torch.cat(full + rest), sum(x.numel() for x in full)
        step = total if whole else limit
        for at in range(0, total, step):
            piece = index[at : at + step]
            yield Columns(piece, piece.numel(), min(max(known - at, 0), piece.numel()))
        return
    for start, end, stop in runs:
        step = stop - start if whole else limit
        for at in range(start, stop, step):
            to = min(at + step, stop)
            yield Columns(slice(at, to), to - at, min(max(end - at, 0), to - at))


def columns_of_heads(kind: Tensor, block_k: int, k_len: int, limit: int) -> Iterator[Columns]:
    """As `columns_of` for several heads at once: kind (n, key blocks); heads with fewer blocks are filled up with keys that do not exist."""
    if k_len % block_k:
        kind = torch.cat((kind[:, :-1], kind[:, -1:].clamp(max=PARTIAL)), 1)  # its tail reaches past the keys
    ranked = torch.sort(kind, dim=-1, descending=True, stable=True)
    used = int((kind > 0).sum(-1).max())
    step = max(1, limit // block_k)
    inside = torch.arange(block_k, device=kind.device)
    for start in range(0, used, step):
        kinds, blocks = ranked.values[:, start : min(start + step, used)], ranked.indices[:, start : min(start + step, used)]
        plain = bool((kinds != PARTIAL).all()) and bool((ranked.values[:, 0] > 0).all())
        blocks = torch.where(kinds > 0, blocks, ranked.indices[:, :1]) if plain else blocks
        index = (blocks[..., None] * block_k + inside).flatten(1)
        exists = (kinds > 0).repeat_interleave(block_k, 1) & (index < k_len)
        full = int((kinds == FULL).all(0).sum()) * block_k
        yield Columns(index.clamp(max=k_len - 1), index.shape[1], full, exists, plain)
