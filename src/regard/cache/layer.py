"""A layer of a transformers cache whose heads may remember different tokens: entries are dropped for good, and know where they stood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingDependency, RegardError

try:
    from transformers.cache_utils import DynamicLayer
except ImportError as missing:
    raise MissingDependency("regard.cache needs transformers: pip install 'regard[hf]'") from missing


SPARE = 32  # entries that a part which grows step by step has room for


@dataclass
class Part:
    """Key heads that remember equally many tokens. heads (h,): their numbers; keys, values (B, h, n, D); places (B, h, n): the numbers of
    the tokens, counted over the padded text; alive (B, h, n) bool: entries that are there; notes: what a policy keeps by entry, (B, h, n)."""

    heads: Tensor
    keys: Tensor
    values: Tensor
    places: Tensor
    alive: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)
    whole: bool | None = None  # whether all entries are there; None: not looked at yet
    room: tuple[Tensor, ...] | None = None  # longer tensors, of which keys, values, places and alive are the first entries
    ordered: bool = True  # whether entries stand in the order of the text
    extract: Part | None = None  # some of the entries once more, for policies that read fewer than they keep; it grows with the part

    def grown(self, keys: Tensor, values: Tensor, start: int, there: Tensor | None) -> Part:
        """With new tokens behind: keys, values (B, Hkv, n, D), numbers from `start` on, there (B, n): which are no padding (None: all)."""
        every = len(self.heads) == keys.shape[1]  # heads of a part are in order
        k, v = (keys, values) if every else (keys.index_select(1, self.heads), values.index_select(1, self.heads))
        notes = {name: torch.cat((note, note.new_zeros(*k.shape[:3])), 2) for name, note in self.notes.items()}
        whole = self.everything() if there is None else None
        extract = None if self.extract is None else self.extract.grown(keys, values, start, there)
        n, m = self.places.shape[2], k.shape[2]
        if not self.room or self.room[0].shape[2] < n + m or (torch.is_grad_enabled() and (k.requires_grad or self.keys.requires_grad)):
            more = m if self.room is None else m + SPARE  # what grows a second time will again
            shape = (*k.shape[:2], more)
            places = torch.arange(start, start + more, device=k.device).expand(shape)
            alive = torch.ones(shape, dtype=torch.bool, device=k.device)
            if there is not None:
                alive[:, :, :m] = there[:, None]
            rp, ra = torch.cat((self.places, places), 2), torch.cat((self.alive, alive), 2)
            if self.room is None or torch.is_grad_enabled():
                k, v = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
                return Part(self.heads, k, v, rp[:, :, : n + m], ra[:, :, : n + m], notes, whole, (), self.ordered, extract)
            rk, rv = (torch.cat((x, y, y.new_empty(*y.shape[:2], SPARE, y.shape[3])), 2) for x, y in ((self.keys, k), (self.values, v)))
        else:
            rk, rv, rp, ra = self.room
            rk.narrow(2, n, m).copy_(k)
            rv.narrow(2, n, m).copy_(v)
            if not self.ordered:  # the room is one that another entry left
                rp.narrow(2, n, m).copy_(torch.arange(start, start + m, device=k.device))
                ra.narrow(2, n, m).fill_(True)
            if there is not None:
                ra.narrow(2, n, m).copy_(there[:, None].expand(*k.shape[:3]))
        k, v, places, alive = rk[:, :, : n + m], rv[:, :, : n + m], rp[:, :, : n + m], ra[:, :, : n + m]
        return Part(self.heads, k, v, places, alive, notes, whole, (rk, rv, rp, ra), self.ordered, extract)

    def everything(self) -> bool:
        """Whether all entries are there."""
        if self.whole is None:
            self.whole = bool(self.alive.all())
        return self.whole

    def mapped(self, change: Callable[[Tensor], Tensor], heads: Tensor | None = None) -> Part:
        """Every tensor (B, h, n, ...) changed alike, those of the extract too: rows or heads."""
        own, heads = self.entries(change), self.heads if heads is None else heads
        own.heads, own.extract = heads, None if self.extract is None else self.extract.mapped(change, heads)
        return own

    def entries(self, change: Callable[[Tensor], Tensor]) -> Part:
        """Every tensor (B, h, n, ...) changed alike, without the extract: other entries, or fewer."""
        k, v, places, alive = (change(x) for x in (self.keys, self.values, self.places, self.alive))
        notes = {name: change(x) for name, x in self.notes.items()}
        return Part(self.heads, k, v, places, alive, notes, ordered=self.ordered)

    def kept(self, index: Tensor) -> Part:
        """The entries at index (B, h, m), in that order."""
        return self.entries(lambda x: rows_at(x, index))

    def of(self, at: Tensor) -> Part:
        """Some of its heads, by their numbers in the part."""
        return self.mapped(lambda x: x.index_select(1, at), self.heads.index_select(0, at))

    def lowest(self, counts: Tensor, scores: Tensor) -> Tensor:
        """(B, h): the entry that goes where one does, the newest of equal ones; one that is not there where a head has no more than its count."""
        if not self.everything():
            there = scores.clamp_max(torch.finfo(scores.dtype).max).masked_fill(~self.alive, torch.inf)
            scores = torch.where((self.alive.sum(2) > counts)[..., None], there, self.alive.to(scores.dtype))
        return self.places.masked_fill(scores > scores.amin(2, keepdim=True), -2).argmax(2)

    def without(self, at: Tensor) -> Part:
        """Less the entry at (B, h) of every head, whose room the last one takes: nothing else is moved."""
        last = self.places.shape[2] - 1
        for x in (self.keys, self.values, self.places, self.alive, *self.notes.values()):
            x.scatter_(2, at.view(*at.shape, *[1] * (x.dim() - 2)).expand(*at.shape, 1, *x.shape[3:]), x[:, :, last:].clone())
        room = self.room or (self.keys, self.values, self.places, self.alive)
        k, v, places, alive = (x[:, :, :last] for x in (self.keys, self.values, self.places, self.alive))
        notes = {name: x[:, :, :last] for name, x in self.notes.items()}
        return Part(self.heads, k, v, places, alive, notes, self.whole or None, room, ordered=False)

    def in_order(self) -> Part:
        """In the order of the text again, what is not there first."""
        if self.ordered:
            return self
        own = self.kept(self.places.masked_fill(~self.alive, -1).argsort(dim=2, stable=True))
        own.ordered = True
        return own

    @property
    def bytes(self) -> int:
        """Of keys and values, those of the extract too."""
        own = sum(x.numel() * x.element_size() for x in (self.keys, self.values))
        return own if self.extract is None else own + self.extract.bytes

    @property
    def held(self) -> int:
        """Of everything, places and notes too, and room to grow."""
        own = self.room or (self.keys, self.values, self.places, self.alive)
        size = sum(x.numel() * x.element_size() for x in (*own, *self.notes.values()))
        return size if self.extract is None else size + self.extract.held


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """The entries of x (B, h, n, ...) at index (B, h, m): (B, h, m, ...)."""
    wide = x.shape[-1]
    if x.dim() == 4 and not x.requires_grad and x.numel() and x.stride()[2:] == (wide, 1) and not any(s % wide for s in x.stride()[:2]):
        b, h = x.stride(0) // wide, x.stride(1) // wide  # whole rows are copied several times faster than numbers are gathered
        rows = x.as_strided(((x.shape[0] - 1) * b + (x.shape[1] - 1) * h + x.shape[2], wide), (wide, 1))
        heads = torch.arange(x.shape[0], device=x.device)[:, None] * b + torch.arange(x.shape[1], device=x.device) * h
        return rows.index_select(0, (index + heads[..., None]).flatten()).view(*index.shape, wide)
    return x.gather(2, index.view(*index.shape, *[1] * (x.dim() - 3)).expand(*index.shape, *x.shape[3:]))


class KeptLayer(DynamicLayer):  # type: ignore[misc]
    """parts: the key heads by how much they remember; seen: tokens so far, which is what the model takes for the layer's length; memory: what a
    policy remembers of each row beside its entries, (B, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = []
        self.seen = 0
        self.prompt = 0  # tokens of the first call
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.memory: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New tokens wait until attention takes them up: what is remembered is read there, head by head."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.fresh = key_states, value_states
        return key_states, value_states

    def take(self, there: Tensor | None) -> None:
        """The waiting tokens behind those remembered; there (B, n) bool: which are no padding (None: all)."""
        assert self.fresh is not None
        k, v = self.fresh
        if not self.parts:
            shape, device = k.shape[:2], k.device
            whole = torch.arange(shape[1], device=device)
            none = torch.zeros(*shape, 0, dtype=torch.long, device=device)
            self.parts = [Part(whole, k[:, :, :0], v[:, :, :0], none, none.bool())]
            self.prompt = k.shape[2]
        elif k.shape[2] > 1:
            self.parts = [part.in_order() for part in self.parts]
        self.parts = [part.grown(k, v, self.seen, there) for part in self.parts]
        self.seen += k.shape[2]
        self.fresh = None

    def keep(self, number: int, counts: Tensor, scores: Tensor) -> None:
        """Of part `number` keep, in every row and head, the counts (B, h) entries of the highest scores (B, h, n); dead ones never.

        Heads that keep equally many stay one part, others become parts of their own. After the prompt kept entries stand in the order of the text; at
        steps the newest entry takes the room of the one that goes.
        """
        part, n = self.parts[number], self.parts[number].places.shape[2]
        counts = counts.clamp_max(n) if part.everything() else torch.minimum(counts, part.alive.sum(2))
        sizes = counts.amax(0)
        least = int(sizes.min())
        if least == n:
            return
        if (
            self.seen > self.prompt
            and least == n - 1 == int(sizes.max())
            and not (part.keys.requires_grad or part.values.requires_grad)
            and (part.everything() or int((part.alive.sum(2) - counts).max()) < 2)
        ):
            self.parts[number] = part.without(part.lowest(counts, scores))
            return
        scores = scores.masked_fill(~part.alive, -torch.inf)
        order = scores.argsort(dim=2, descending=True, stable=True)
        made = []
        for size in sizes.unique().tolist():
            at = (sizes == size).nonzero()[:, 0]
            own, index = part.of(at), order.index_select(1, at)[..., :size]
            living = torch.arange(size, device=index.device) < counts.index_select(1, at)[..., None]
            places = own.places.gather(2, index).masked_fill(~living, -1)  # what is dead stands first
            turn = places.argsort(dim=2, stable=True)
            kept = own.kept(index.gather(2, turn))
            kept.alive, kept.whole, kept.ordered = living.gather(2, turn), None, True
            made.append(kept)
        self.parts[number : number + 1] = made

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows(lambda x: x.repeat_interleave(repeats, 0))

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of the batch, in all that is remembered."""
        self.parts = [part.mapped(change) for part in self.parts]
        self.memory = {name: change(x) for name, x in self.memory.items()}

    def crop(self, tokens_to_remove: int) -> None:
        raise RegardError("a cache under a policy cannot go back, for it has forgotten; expected generation without assistants")

    def reset(self) -> None:
        self.parts, self.memory, self.seen, self.prompt, self.is_initialized = [], {}, 0, 0, False

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, in whatever form they are kept."""
        return sum(part.bytes for part in self.parts)

    @property
    def held(self) -> int:
        """Bytes of everything: keys, values, where they stood, and what a policy notes."""
        return sum(part.held for part in self.parts) + sum(x.numel() * x.element_size() for x in self.memory.values())
