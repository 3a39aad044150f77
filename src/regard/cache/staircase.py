"""Staircase quantisation (SAQ; Li, 2024): the older a token, the fewer bits its keys and values have.

code = round((x - low) / step), step = (high - low) / (2^bits - 1), x^ = step code + low;   keys: low and high of `group` tokens, by channel;
values: of `group` channels, by token (KIVI; Liu et al., 2024)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError
from .layer import KeptLayer, Part
from .policy import Policy
from .view import View

WIDTHS = (1, 2, 4, 8)
PARTS = ("codes", "step", "low")


@dataclass(frozen=True)
class Codes:
    """codes (..., bytes) uint8, low bits first; step, low: what turns them back; width: numbers in the last dimension."""

    codes: Tensor
    step: Tensor
    low: Tensor
    bits: int
    width: int

    def restored(self) -> Tensor:
        places = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=self.codes.device)
        found = (self.codes[..., None] >> places) & (2**self.bits - 1)
        return self.step * found.flatten(-2)[..., : self.width].to(self.step.dtype) + self.low


def quantised(x: Tensor, bits: int, dim: int) -> Codes:
    """x in 2^bits even steps between its least and greatest number over `dim`; what is packed into bytes is its last dimension."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high.double() - low.double()).div(2**bits - 1).to(x.dtype)  # in half precision the range itself may overflow
    code = ((x.double() - low.double()) / torch.where(step == 0, 1.0, step.double())).round().clamp(0, 2**bits - 1).to(torch.uint8)
    each = 8 // bits
    parts = F.pad(code, (0, -code.shape[-1] % each)).unflatten(-1, (-1, each))
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    return Codes((parts << places).sum(-1, dtype=torch.uint8), step, low, bits, x.shape[-1])


class Staircase(Policy):
    """Keys and values of the last `edges[0]` tokens as they were computed, of those before them in `bits[1]` bits up to age `edges[1]`, and so
    on. Nothing is dropped; prompts attend in full precision, and steps read what is stored.

    bits: of each stair, falling, 16 first (as computed), then among 8, 4, 2, 1. edges: ages at which stairs end, growing, one fewer. group:
    tokens that share a key channel's steps, and channels that share a token's (at most head_dim, which it divides). `group` tokens go down
    together when the newest of them is of that age, and are quantised again from what they were: an error of at most half a step each time.
    Any number of key heads (one: MQA). `held(cache)` is the bytes of a cache. Refuses padded batches: groups of rows would begin elsewhere.
    """

    def __init__(self, bits: Sequence[int] = (16, 8, 4, 2), edges: Sequence[int] = (128, 512, 2048), group: int = 32):
        self.bits, self.edges, self.group = tuple(bits), tuple(edges), group
        falls = all(a > b for a, b in pairwise(self.bits)) and all(a < b for a, b in pairwise(self.edges))
        known = self.bits[:1] == (16,) and all(b in WIDTHS for b in self.bits[1:])
        if not (falls and known and len(self.edges) == len(self.bits) - 1 and group >= 1 and min(self.edges, default=0) >= 0):
            raise RegardError(
                f"bits={self.bits}, edges={self.edges}, group={group}: expected 16 and then falling numbers among 8, 4, 2, 1; one edge fewer, "
                "growing, from 0; and a group of at least 1"
            )
        super().__init__(1.0)

    def starts(self, seen: int) -> list[int]:
        """The first token of each stair after `seen` tokens, and 0 behind the last: stair n is starts[n] .. starts[n - 1]."""
        return [max(0, seen - edge) // self.group * self.group for edge in self.edges] + [0]

    def stored(self, view: View) -> dict[int, tuple[Codes, Codes]]:
        """(keys, values) of the stairs below the first, by number, the oldest tokens first; empty ones left out."""
        memory, found = view.memory, {}
        widths = view.part.keys.shape[-1], min(self.group, view.part.values.shape[-1])
        for n in range(len(self.bits) - 1, 0, -1):
            if f"keys {n} codes" in memory:
                (k, k_step, k_low), (v, v_step, v_low) = ([memory[f"{name} {n} {what}"] for what in PARTS] for name in ("keys", "values"))
                found[n] = Codes(k, k_step, k_low, self.bits[n], widths[0]), Codes(v, v_step, v_low, self.bits[n], widths[1])
        return found

    @staticmethod
    def whole(stairs: dict[int, tuple[Codes, Codes]], part: Part) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, n, D) of all tokens that are remembered, as they would be read."""
        keys = [k.restored().flatten(2, 3) for k, _ in stairs.values()]
        values = [v.restored().flatten(3, 4) for _, v in stairs.values()]
        return torch.cat([*keys, part.keys], 2), torch.cat([*values, part.values], 2)

    def reading(self, view: View) -> Part:
        part, stairs = view.part, self.stored(view)
        if not stairs:
            return part
        keys, values = self.whole(stairs, part)
        places = torch.arange(keys.shape[2], device=keys.device).expand(*keys.shape[:3])
        return Part(part.heads, keys, values, places, torch.ones_like(places, dtype=torch.bool))

    def run(self, layer: KeptLayer, number: int, view: View) -> None:
        """What has grown old goes down the stairs; what stays on its stair keeps its codes."""
        part, wide, group = view.part, view.part.values.shape[-1], min(self.group, view.part.values.shape[-1])
        if not bool(part.alive.all()):
            raise RegardError("Staircase on a batch with padding, where groups of rows would begin elsewhere; expected rows of one length")
        if wide % group:
            raise RegardError(f"group={self.group} and heads of {wide} channels; expected a group that divides them")
        new, old = self.starts(layer.seen), self.starts(layer.seen - view.query.shape[3])
        if new == old:
            return
        stairs = self.stored(view)
        keys, values = self.whole(stairs, part)
        for n in range(1, len(self.bits)):
            stay, low, high = (new[n], min(old[n - 1], new[n - 1])), max(new[n], old[n - 1]), new[n - 1]
            k = quantised(keys[:, :, low:high].unflatten(2, (-1, self.group)), self.bits[n], 3) if low < high else None
            v = quantised(values[:, :, low:high].unflatten(3, (-1, group)), self.bits[n], 4) if low < high else None
            for name, own, came, unit in zip(("keys", "values"), stairs.get(n, (None, None)), (k, v), (self.group, 1), strict=True):
                begin, end = ((at - old[n]) // unit for at in stay)
                for what in PARTS:
                    kept = [] if own is None or begin >= end else [getattr(own, what)[:, :, begin:end]]
                    kept += [] if came is None else [getattr(came, what)]
                    if kept:
                        view.memory[f"{name} {n} {what}"] = torch.cat(kept, 2)
                    else:
                        view.memory.pop(f"{name} {n} {what}", None)
        layer.parts[number] = part.entries(lambda x: x[:, :, x.shape[2] - (layer.seen - new[0]) :].clone())

    @staticmethod
    def held(cache: Any) -> int:
        """Bytes of keys and values in a session's cache: codes, steps, lows, and what is in full precision."""
        codes = [x for layer in cache.layers for name, x in layer.memory.items() if name.startswith(("keys ", "values "))]
        return sum(layer.bytes for layer in cache.layers) + sum(x.numel() * x.element_size() for x in codes)
