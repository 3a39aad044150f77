"""Checks of recurrent-memory-transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal, Rope
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.recurrent_memory_transformer import RecurrentMemoryBlock


@check(
    "recurrent-memory-transformer",
    "token by token equals the chunked pass, L = 70, C = 16, M = 4, with and without the global branch",
    below=1e-10,
    control="memory held back a chunk",
)
def _() -> tuple[float, float]:
    own, x = 0.0, torch.randn(2, 70, 16, dtype=F64)
    with torch.no_grad():
        for use_global in (False, True):
            layer = RecurrentMemoryBlock(16, 2, chunk=16, slots=4, use_global=use_global).double()
            state, outs = None, []
            for t in range(70):
                out, state = layer.step(x[:, t : t + 1], state)
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
