"""Entries in few bits: keys by channel over groups of tokens, values by token over groups of channels, the newest ones as they came.

scale = (max - min) / (2^bits - 1) of a group,   code = round((x - min) / scale),   x' = code scale + min       (KIVI; Liu et al., 2024)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RegardError
from .layer import Part, rows_at


class Codes(NamedTuple):
    """Groups along one axis. codes (B, h, n, ..., bytes) uint8, 8 / bits numbers a byte; scale, least (B, h, n, ...): of each group."""

    codes: Tensor
    scale: Tensor
    least: Tensor

    @classmethod
    def of(cls, x: Tensor, bits: int, axis: int) -> Codes:
        """The numbers x, whose groups lie along `axis`. Scales have the dtype of x; a group of equal numbers is kept exactly."""
        least, most = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        scale = ((most.to(wide(x)) - least.to(wide(x))) / (2**bits - 1)).to(x.dtype)
        steps = (x.to(wide(x)) - least.to(wide(x))) / torch.where(scale > 0, scale, 1).to(wide(x))
        codes = steps.round().clamp(0, 2**bits - 1).to(torch.uint8)
        planes = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
        packed = planes[0]
        for at, plane in enumerate(planes[1:], 1):
            packed = packed | (plane << (bits * at))
        return cls(packed, scale, least)

    def numbers(self, bits: int) -> Tensor:
        """What the codes stand for, in the dtype of the scales."""
        planes = [(self.codes >> (bits * at)) & (2**bits - 1) for at in range(8 // bits)]
        x = torch.cat(planes, -1).to(wide(self.scale))
        return x.mul_(self.scale).add_(self.least).to(self.scale.dtype)

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        return Codes(*map(change, self))


def wide(x: Tensor) -> torch.dtype:
    """What is reckoned in."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


BITS = (2, 4, 8)


@dataclass(frozen=True)
class Form:
    """How entries are stored; see `KIVI`. RegardError for bits other than 2, 4, 8 and groups that do not divide."""

    key_bits: int
    value_bits: int
    group: int = 32
    recent: int = 128

    def __post_init__(self) -> None:
        group, recent = self.group, self.recent
        if self.key_bits not in BITS or self.value_bits not in BITS:
            raise RegardError(f"key_bits={self.key_bits}, value_bits={self.value_bits}: expected 2, 4 or 8")
        if group < 4 or group % 4 or recent < group or recent % group:
            raise RegardError(f"group={group}, recent={recent}: expected a multiple of 4, and a multiple of the group")


class Packed(Part):
    """A part whose old entries are codes. Entries of a head stand from the left, in the order of the text, the call's new tokens behind all.

    Of the count c of a row and head, keys up to the last multiple of `recent` are pages of `recent` tokens, and the rest as they came; so are the
    newest `recent` values, and the older ones are codes.
    """

    def __init__(
        self, form: Form, heads: Tensor, count: Tensor, where: Tensor, pages: Codes, rest: Tensor, codes: Codes, window: Tensor, fresh: Part
    ):
        """count (B, h); where (B, h, n) int32: places; pages: of keys, (B, h, pages, groups, group, D); rest: the other keys; codes: of values,
        (B, h, n, groups, group); window: the other values; fresh: the call's tokens, not yet stored."""
        self.form, self.heads, self.count, self.where, self.notes = form, heads, count, where, {}
        self.pages, self.rest, self.codes, self.window, self.fresh = pages, rest, codes, window, fresh
        self.whole, self.room = None, None

    @classmethod
    def stored(cls, part: Part, form: Form) -> Packed:
        """What a part remembers, stored, with the call's tokens if it is stored already; RegardError where channels make no whole groups."""
        if isinstance(part, Packed):
            return part.settled()
        k, v, g = part.keys, part.values, form.group
        for name, x in (("keys", k), ("values", v)):
            if x.shape[3] % g:
                raise RegardError(f"group={g}: {name} have {x.shape[3]} channels a head; expected a group that divides them")
        none = k[:, :, :0]
        shape = (*k.shape[:2], 0)
        pages = Codes.of(torch.empty(*shape, form.recent // g, g, k.shape[3], dtype=k.dtype, device=k.device), form.key_bits, -2)
        codes = Codes.of(torch.empty(*shape, v.shape[3] // g, g, dtype=v.dtype, device=v.device), form.value_bits, -1)
        count = torch.zeros(shape[:2], dtype=torch.long, device=k.device)
        return cls(form, part.heads, count, part.places[:, :, :0].int(), pages, none, codes, v[:, :, :0], part).settled()

    def settled(self) -> Packed:
        """The call's tokens stored, and what is no longer new packed."""
        form, r = self.form, self.form.recent
        order = (~self.fresh.alive).to(torch.uint8).argsort(dim=2, stable=True)  # what is there stands first
        fresh, added = self.fresh.kept(order), self.fresh.alive.sum(2)
        new = torch.arange(fresh.places.shape[2], device=added.device)
        count = self.count + added

        whole, left = self.count // r, self.count % r
        keys = behind(self.rest, left, fresh.keys, new)
        full = (left + added) // r
        pages, most = self.pages, int(full.max())
        if most:
            made = keys[:, :, : most * r].unflatten(2, (most, r // form.group, form.group))
            pages = joined(pages, whole, Codes.of(made, form.key_bits, -2), full)
        held = torch.arange(int((count % r).max()), device=added.device)
        rest = rows_at(keys, (full[..., None] * r + held).clamp_max(keys.shape[2] - 1))

        old, here = (self.count - r).clamp_min(0), self.count.clamp_max(r)
        values = behind(self.window, here, fresh.values, new)
        leaving = (count - r).clamp_min(0) - old
        codes, most = self.codes, int(leaving.max())
        if most:
            made = values[:, :, :most].unflatten(3, (-1, form.group))
            codes = joined(codes, old, Codes.of(made, form.value_bits, -1), leaving)
        held = torch.arange(int(count.clamp_max(r).max()), device=added.device)
        window = rows_at(values, (leaving[..., None] + held).clamp_max(values.shape[2] - 1))

        where = behind(self.where, self.count, fresh.places.int(), new)[:, :, : int(count.max())]
        return Packed(form, self.heads, count, where, pages, rest, codes, window, nothing(fresh))

    def grown(self, keys: Tensor, values: Tensor, start: int, there: Tensor | None) -> Packed:
        made = self.mapped(lambda x: x)
        made.fresh = self.fresh.grown(keys, values, start, there)
        return made

    def numbers(self) -> Part:
        """All entries as numbers."""
        return Part(self.heads, self.keys, self.values, self.places, self.alive)

    def spread(self, coded: Tensor, other: Tensor, start: Tensor, fresh: Tensor) -> Tensor:
        """(B, h, n, D): coded entries from the left, the others from `start` (B, h) on, the call's behind."""
        n, rows = self.where.shape[2], other.shape[2]
        out = other.new_zeros(*other.shape[:2], n + max(1, fresh.shape[2]), other.shape[3])
        stop = min(n, coded.shape[2])
        out[:, :, :stop] = coded[:, :, :stop]
        at = (start[..., None] + torch.arange(rows, device=start.device)).clamp_max(n)  # beyond the end: written over below, or cut off
        out.scatter_(2, at[..., None].expand(*other.shape), other)
        out[:, :, n : n + fresh.shape[2]] = fresh
        return out[:, :, : n + fresh.shape[2]]

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        r = self.form.recent
        return self.spread(self.pages.numbers(self.form.key_bits).flatten(2, 4), self.rest, self.count // r * r, self.fresh.keys)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        start = (self.count - self.form.recent).clamp_min(0)
        return self.spread(self.codes.numbers(self.form.value_bits).flatten(3, 4), self.window, start, self.fresh.values)

    @property
    def places(self) -> Tensor:  # type: ignore[override]
        return torch.cat((self.where.long(), self.fresh.places), 2)

    @property
    def alive(self) -> Tensor:  # type: ignore[override]
        there = torch.arange(self.where.shape[2], device=self.count.device) < self.count[..., None]
        return torch.cat((there, self.fresh.alive), 2)

    def mapped(self, change: Callable[[Tensor], Tensor], heads: Tensor | None = None) -> Packed:
        """Rows or heads changed; which entries there are, is not."""
        rest, window, where, count = (change(x) for x in (self.rest, self.window, self.where, self.count))
        fresh = self.fresh.mapped(change, heads)
        return Packed(self.form, fresh.heads, count, where, self.pages.each(change), rest, self.codes.each(change), window, fresh)

    def kept(self, index: Tensor) -> Part:
        raise RegardError(
            "entries in few bits cannot be dropped one by one; expected a policy that drops before they are packed: KIVI(base=...)"
        )

    @property
    def bytes(self) -> int:
        held = (*self.pages, self.rest, *self.codes, self.window, self.fresh.keys, self.fresh.values)
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def held(self) -> int:
        return self.bytes + self.fresh.held - self.fresh.bytes + sum(x.numel() * x.element_size() for x in (self.where, self.count))


def unpacked(part: Part) -> Part:
    """All entries as numbers."""
    return part.numbers() if isinstance(part, Packed) else part


def nothing(part: Part) -> Part:
    """A part of the same heads without entries."""
    none = part.entries(lambda x: x[:, :, :0])
    return replace(none, notes={})


def behind(x: Tensor, counts: Tensor, more: Tensor, new: Tensor) -> Tensor:
    """x (B, h, n, ...), of which the first counts (B, h) entries are there, with `more` (B, h, m, ...) right behind them."""
    at = counts[..., None] + new
    return torch.cat((x, more), 2).scatter_(2, at.view(*at.shape, *[1] * (x.dim() - 3)).expand(*more.shape), more)


def joined(old: Codes, counts: Tensor, new: Codes, added: Tensor) -> Codes:
    """Of every row and head the first counts (B, h) of `old` and the first added (B, h) of `new`."""
    slots = torch.arange(int((counts + added).max()), device=counts.device).expand(*counts.shape, -1)
    size, counts = old.codes.shape[2], counts[..., None]
    index = torch.where(slots < counts, slots, size + slots - counts).clamp_max(size + new.codes.shape[2] - 1)
    return Codes(*(rows_at(torch.cat(both, 2), index) for both in zip(old, new, strict=True)))
