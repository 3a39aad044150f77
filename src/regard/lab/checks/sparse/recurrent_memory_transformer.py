"""Checks of recurrent-memory-transformer."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from regard.algebra import Causal, Rope
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, rotary, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.zoo.sparse.recurrent_memory_transformer import RecurrentMemoryBlock


@check(
    "recurrent-memory-transformer",
    "steps of one and of several tokens equal the chunked pass, L = 70, C = 16, M = 4, with and without the global branch",
    below=1e-10,
    control="memory held back a chunk",
)
def _() -> tuple[float, float]:
    own, x = 0.0, torch.randn(2, 70, 16, dtype=F64)
    with torch.no_grad():
        for use_global in (False, True):
            layer = RecurrentMemoryBlock(16, 2, chunk=16, slots=4, use_global=use_global).double()
            state, outs = None, []
            for part in x.split((1, 1, 20, 1, 40, 7), 1):
                out, state = layer.step(part, state)
                outs.append(out)
            whole = layer(x)
            assert isinstance(whole, Tensor)
            own = max(own, naive.gap(torch.cat(outs, 1), whole))
        alone = torch.cat([layer(part) for part in x.split(16, 1)], 1)
    return own, naive.gap(alone, whole)


def influence(open_gate: bool, slots: int, chunk: int) -> float:
    """How much a token of chunk 0 moves the outputs of a later chunk (C = 8, local branch alone)."""
    torch.manual_seed(0)
    layer = RecurrentMemoryBlock(16, 2, chunk=8, slots=slots).double()
    torch.nn.init.zeros_(layer.gate.weight)
    torch.nn.init.constant_(layer.gate.bias, 30.0 if open_gate else -40.0)
    x = torch.randn(1, 64, 16, dtype=F64)
    moved = x.clone()
    moved[:, 3] += 1
    with torch.no_grad():
        a, b = layer(x), layer(moved)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return naive.gap(a[:, chunk * 8 : chunk * 8 + 8], b[:, chunk * 8 : chunk * 8 + 8])


@check(
    "recurrent-memory-transformer",
    "a token of chunk 0 moves chunk 2 only through open memory: largest move with M = 0 or the gate shut",
    below=1e-12,
    control="M = 3, gate open",
)
def _() -> tuple[float, float]:
    return max(influence(True, 0, 2), influence(False, 3, 2)), influence(True, 3, 2)


@check(
    "recurrent-memory-transformer",
    "after M more chunks its slot is gone (gate 1): the move of chunk 4 with M = 3",
    below=1e-10,
    control="chunk 3",
)
def _() -> tuple[float, float]:
    return influence(True, 3, 4), influence(True, 3, 3)


@check(
    "recurrent-memory-transformer",
    "M = 0 and C >= L is causal attention with rotary positions a head",
    below=1e-12,
    control="one base for all heads",
)
def _() -> tuple[float, float]:
    layer, x = RecurrentMemoryBlock(16, 2, chunk=64, slots=0).double(), torch.randn(2, 40, 16, dtype=F64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)

    def run(bases: tuple[float, float]) -> Tensor:
        at = torch.arange(40)
        turned = [torch.cat([Rope(base=base).rotate(y[:, h : h + 1], at) for h, base in enumerate(bases)], 1) for y in (q, k)]
        return layer.out(attend(*turned, v, mask=Causal()).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    y = layer(x)
    assert isinstance(y, Tensor)
    return naive.gap(y, run((1e3, 1e5))), naive.gap(y, run((1e4, 1e4)))


def memory_loop(layer: RecurrentMemoryBlock, x: Tensor, slot_bias: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(y, memory keys, memory values) of the block from its weights, a token at a time."""
    batch, length, dim = x.shape
    heads, width, size = layer.heads, dim // layer.heads, layer.chunk
    q, k, v = (split_heads(y, heads) for y in (x @ layer.qkv.weight.T).chunk(3, -1))
    at, bases = torch.arange(length), [1e3 * 100 ** (h / (heads - 1)) for h in range(heads)]
    turned_q, turned_k = (torch.stack([rotary(y[:, h], at, base) for h, base in enumerate(bases)], 1) for y in (q, k))
    out = torch.zeros(batch, heads, length, width, dtype=x.dtype)
    memories = torch.zeros(2, batch, heads, layer.slots, width, dtype=x.dtype)
    for b in range(batch):
        for h in range(heads):
            slots = [(memories[0, b, h, m], memories[1, b, h, m]) for m in range(layer.slots)]
            for i in range(length):
                first = i // size * size
                s = [turned_q[b, h, i] @ key / math.sqrt(width) + layer.bias[h, m] * slot_bias for m, (key, _) in enumerate(slots)]
                s += [turned_q[b, h, i] @ turned_k[b, h, j] / math.sqrt(width) for j in range(first, i + 1)]
                values = torch.stack([value for _, value in slots] + [v[b, h, j] for j in range(first, i + 1)])
                local = torch.stack(s).softmax(0) @ values
                if layer.mix is not None:
                    far = (turned_k[b, h, : i + 1] @ turned_q[b, h, i] / math.sqrt(width)).softmax(0) @ v[b, h, : i + 1]
                    a = 1 / (1 + torch.exp(-layer.mix[h]))
                    local = a * local + (1 - a) * far
                out[b, h, i] = local
                if i == first + size - 1:  # the chunk is complete: its parts' means, gated against the newest slot, push the oldest out
                    per, more = divmod(size, layer.written)
                    edges, fresh = [first], []
                    for r in range(layer.written):
                        edges.append(edges[-1] + per + (r < more))
                    for low, high in pairwise(edges):
                        z = k[b, h, low:high].mean(0), v[b, h, low:high].mean(0)
                        g = torch.sigmoid(torch.cat((*z, *slots[-1])) @ layer.gate.weight[0] + layer.gate.bias[0])
                        fresh.append((g * z[0] + (1 - g) * slots[-1][0], g * z[1] + (1 - g) * slots[-1][1]))
                    slots = [*slots, *fresh][layer.written :]
            for n in range(2):
                memories[n, b, h] = torch.stack([slot[n] for slot in slots])
    return join_heads(out) @ layer.out.weight.T, memories[0], memories[1]


@check(
    "recurrent-memory-transformer",
    "outputs and memory equal a token loop from the weights: slot biases, gate against the newest slot, several slots a chunk, global branch",
    below=1e-10,
    control="no slot biases",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    own, x = 0.0, torch.randn(2, 31, 12, dtype=F64)
    for written, use_global in ((1, False), (2, True), (3, False)):
        layer = RecurrentMemoryBlock(12, 2, chunk=7, slots=4, written=written, use_global=use_global).double()
        for p in (layer.bias, *([layer.mix] if layer.mix is not None else [])):
            torch.nn.init.normal_(p, std=2)
        truth = memory_loop(layer, x)
        y, memory = layer(x, return_memory=True)
        assert isinstance(y, Tensor)
        own = max(own, *(naive.gap(a, b) for a, b in zip((y, *memory), truth, strict=True)))
        if layer.mix is None:  # the memory handed on
            early = layer(x[:, :14], return_memory=True)[1]
            later = layer(x[:, 14:], early, first=14)
            assert isinstance(later, Tensor) and isinstance(early, tuple)
            own = max(own, naive.gap(later, y[:, 14:]))
    return own, naive.gap(y, memory_loop(layer, x, False)[0])


@check(
    "recurrent-memory-transformer",
    "gradients go back through `bptt` chunks of memory and no further: of chunk 3's output to the tokens of chunk 1, bptt = 1",
    below=0,
    control="bptt = None",
)
def _() -> tuple[float, float]:
    found = []
    for bptt in (1, None):
        torch.manual_seed(1)
        layer = RecurrentMemoryBlock(12, 2, chunk=8, slots=4, bptt=bptt).double()
        x = torch.randn(1, 32, 12, dtype=F64, requires_grad=True)
        y = layer(x)
        assert isinstance(y, Tensor)
        found.append(float(torch.autograd.grad(y[:, 24:].square().sum(), x)[0][:, 8:16].abs().max()))
    return found[0], found[1]


def recalled(slots: int, seed: int) -> float:
    """Share of sequences of 7 tokens in chunks of 3 whose first token two layers, trained from scratch, name at the end."""
    torch.manual_seed(seed)
    layers = [RecurrentMemoryBlock(16, 2, chunk=3, slots=slots) for _ in range(2)]
    model, generator = Decoder(layers, vocab=5, dim=16, layers=2, heads=2), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def batch(count: int) -> Tensor:
        return torch.cat((torch.randint(4, (count, 6), generator=generator), torch.full((count, 1), 4)), 1)

    for _ in range(75):
        tokens = batch(16)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens)[:, -1], tokens[:, 0]).backward()
        optimizer.step()
    tokens = batch(256)
    with torch.no_grad():
        return float((model(tokens)[:, -1].argmax(-1) == tokens[:, 0]).float().mean())


@check(
    "recurrent-memory-transformer",
    "a small language model recalls a token from two chunks back (chance: 0.25): accuracy, median of 3 seeds",
    above=0.6,
    control="no memory slots",
)
def _() -> tuple[float, float]:
    return sorted(recalled(3, seed) for seed in range(3))[1], recalled(0, 0)
