"""Chunks with a gated first-in-first-out memory of past chunks, and global attention beside them (recurrent memory transformer, 2025).

K = [memory; RoPE(chunk)], causal inside the chunk, memory in full view; after a chunk: slot <- g z + (1 - g) newest, z pooled from the chunk
o = sigmoid(a_h) o_local + (1 - sigmoid(a_h)) o_global where a global branch is
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.algebra import Causal, Input, Rope, Sinks, Weighted
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import one_by_one, takes, whole


def biased(s: Tensor, slot_bias: Tensor) -> Tensor:
    return s + slot_bias


BIASED = Weighted(position=biased, inputs=(Input("slot_bias", "hk"),))


@dataclass
class MemoryState:
    """Memory slots (B, H, M, D), the open chunk's keys and values, what the global branch reads, and tokens so far."""

    memory: tuple[Tensor, Tensor]
    chunk: tuple[Tensor, Tensor]
    past: tuple[Tensor, Tensor] | None
    length: int

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.memory, *self.chunk, *(self.past or ())))


@register("recurrent-memory-transformer", kind="module")
class RecurrentMemoryBlock(nn.Module):
    """x (B, L, dim) -> y (B, L, dim); `memory` may be passed in and `return_memory` hands it on, (keys, values) (B, H, M, D), with `first`, the
    position of x's first token, which starts a chunk (a global branch would miss what came before: such layers go on by `step`).

    chunk: C. slots: M. written: r slots written a chunk (means of its r parts). use_global: a branch of causal attention over everything.
    bptt: chunks that gradients flow back through the memory (None: all). rope_bases: first and last of the heads' rotary bases, spread
    geometrically. Rotary positions are those in the whole sequence; memory keys carry none, but a learned bias a slot. No formulas are
    published: this is regard's definition.
    """

    def __init__(
        self, dim: int, heads: int, *, chunk: int = 128, slots: int = 16, written: int = 1, use_global: bool = False, bptt: int | None = None,
        rope_bases: tuple[float, float] = (1e3, 1e5),
    ):  # fmt: skip
        super().__init__()
        self.dim = dim
        if dim % heads or (slots and not 1 <= written <= slots) or chunk < max(1, written):
            raise RegardError(
                f"dim={dim}, heads={heads}, slots={slots}, written={written}, chunk={chunk}: expected a multiple, and 1 <= written <= slots, chunk"
            )
        self.heads, self.chunk, self.slots, self.written, self.bptt = heads, chunk, slots, written, bptt
        width = dim // heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, False), nn.Linear(dim, dim, False)
        self.gate = nn.Linear(4 * width, 1)
        self.bias = nn.Parameter(torch.zeros(heads, slots))
        self.mix = nn.Parameter(torch.zeros(heads)) if use_global else None
        low, high = rope_bases
        self.ropes = [Rope(base=low * (high / low) ** (h / max(1, heads - 1))) for h in range(heads)]

    def split(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k with rotary positions, v, and k as it is written to memory."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        at = torch.arange(first, first + x.shape[1], device=x.device)
        turned = [torch.cat([rope.rotate(y[:, h : h + 1], at) for h, rope in enumerate(self.ropes)], 1) for y in (q, k)]
        return turned[0], turned[1], v, k

    def empty(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = x.new_zeros(x.shape[0], self.heads, self.slots, x.shape[-1] // self.heads)
        return memory, memory

    def local(self, q: Tensor, k: Tensor, v: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """Queries at the end of a chunk's keys, which are read causally beside the memory."""
        keys, values = torch.cat((memory[0], k), 2), torch.cat((memory[1], v), 2)
        if not self.slots:
            return attend(q, keys, values, mask=Causal())
        bias = torch.cat((self.bias, self.bias.new_zeros(self.heads, k.shape[2])), 1)
        return attend(q, keys, values, BIASED, mask=Causal() | Sinks(self.slots), slot_bias=bias)

    def write(self, memory: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The memory after a complete chunk: r gated slots appended, the r oldest dropped."""
        if not self.slots:
            return memory
        z = [torch.stack([part.mean(2) for part in x.tensor_split(self.written, 2)], 2) for x in (k, v)]
        newest = [x[:, :, -1:].expand_as(y) for x, y in zip(memory, z, strict=True)]
        g = torch.sigmoid(self.gate(torch.cat((*z, *newest), -1)))
        return tuple(torch.cat((m[:, :, self.written :], g * y + (1 - g) * n), 2) for m, y, n in zip(memory, z, newest, strict=True))  # type: ignore[return-value]

    def join(self, local: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.mix is not None:
            a = torch.sigmoid(self.mix)[:, None, None]
            local = a * local + (1 - a) * attend(q, k, v, mask=Causal())
        return self.out(local.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @takes(x="batch length dim")
    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None, return_memory: bool = False, first: int = 0
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        if first < 0 or first % self.chunk or (self.mix is not None and (memory is not None or first)):
            raise RegardError(
                f"first={first}, memory={'None' if memory is None else 'given'}, use_global={self.mix is not None}: expected the start of a chunk "
                f"of {self.chunk} tokens, and neither where there is a global branch; use step to go on there"
            )
        q, k, v, plain = self.split(x, first)
        memory, outs = memory or self.empty(x), []
        for number, start in enumerate(range(0, x.shape[1], self.chunk)):
            rows = slice(start, start + self.chunk)
            outs.append(self.local(q[:, :, rows], k[:, :, rows], v[:, :, rows], memory))
            if start + self.chunk <= x.shape[1]:
                memory = self.write(memory, plain[:, :, rows], v[:, :, rows])
                if self.bptt is not None and (number + 1) % self.bptt == 0:
                    memory = (memory[0].detach(), memory[1].detach())
        y = self.join(torch.cat(outs, 2), q, k, v)
        return (y, memory) if return_memory else y

    @whole
    @takes(x="batch length dim")
    @one_by_one
    def step(self, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """New tokens (B, n, dim), one after the other; the state does not grow unless there is a global branch."""
        if state is None:
            none = x.new_zeros(x.shape[0], self.heads, 0, x.shape[-1] // self.heads)
            state = MemoryState(self.empty(x), (none, none), (none, none) if self.mix is not None else None, 0)
        first = state.length
        q, k, v, plain = self.split(x, first)
        chunk = torch.cat((state.chunk[0], plain), 2), torch.cat((state.chunk[1], v), 2)
        at = torch.arange(first + 1 - chunk[0].shape[2], first + 1, device=x.device)
        turned = torch.cat([rope.rotate(chunk[0][:, h : h + 1], at) for h, rope in enumerate(self.ropes)], 1)
        o = self.local(q, turned, chunk[1], state.memory)
        past = None if state.past is None else (torch.cat((state.past[0], k), 2), torch.cat((state.past[1], v), 2))
        y = self.join(o, q, *(past or (k, v)))
        memory = state.memory
        if chunk[0].shape[2] == self.chunk:
            memory, chunk = self.write(memory, *chunk), (plain[:, :, :0], v[:, :, :0])
        return y, MemoryState(memory, chunk, past, first + 1)
