"""Launching the generated Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import Call, sides_of, varying, weigh
from ..layout import layout
from ..problem import Problem
from ..reference import Stats
from ..tiled.run import finish
from .generate import compiled, generate


def blocks(head_dim: int) -> tuple[int, int]:
    return (64, 64) if head_dim <= 128 else (32, 32)


def within(size: int, selected: int) -> int | None:
    """The largest tile of at most `size` that a selection's blocks are made of; None: there is none."""
    return next((tile for tile in (64, 32, 16) if tile <= size and selected % tile == 0), None)


def takes(problem: Problem) -> bool:
    """Whether a selection's blocks are such as the kernel's tiles can follow; the tiled executor runs the others."""
    selection = problem.selection
    return selection is None or (within(64, selection.block_q) is not None and within(64, selection.block_k) is not None)


def splits_of(q_len: int, key_blocks: int, programs: int) -> int:
    """Parts that a row's keys are split into: few queries (decoding) would leave most of a GPU idle."""
    return max(1, min(16, key_blocks // 4, 256 // max(1, programs))) if q_len <= 16 else 1


def power_of_two(n: int) -> int:
    return max(16, 1 << math.ceil(math.log2(n)))


class Triton:
    """The backend of `kernels.weighted` that runs Triton; blocks: entries and lengths by rows, then by columns."""

    def launch(
        self,
        call: Call,
        name: str,
        tensors: list[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: list[Tensor],
        sides: list[Tensor],
        splits: int = 1,
    ) -> None:
        entries, lengths = lists
        more = {"SPLITS": splits} if name == "forward" else {}
        strides = []
        for (_, letters), x in zip(call.source.sides, sides, strict=True):
            strides += [x.stride("bhqk".index(letter)) for letter in letters]

        def stride(x: Tensor, dim: int) -> int:
            return x.stride(dim) if x.shape[dim] > 1 else 0

        b, heads, q_len, d = q.shape
        k_len, dv = k.shape[2], v.shape[-1]
        compiled(call.source)[name][entries.shape[2], b * heads, splits](
            *tensors,
            *sides,
            entries,
            lengths,
            q_len,
            k_len,
            k_len - q_len,
            stride(entries, 0),
            stride(entries, 1),
            entries.stride(2),
            stride(lengths, 0),
            stride(lengths, 1),
            *strides,
            HEADS=heads,
            GROUP=heads // k.shape[1],
            BLOCK_M=call.block_q,
            BLOCK_N=call.block_k,
            D=d,
            DV=dv,
            D_PAD=power_of_two(d),
            DV_PAD=power_of_two(dv),
            **more,
        )

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        splits = 1 if call.source.root else splits_of(q.shape[2], blocks[0].shape[3], q.shape[0] * q.shape[1])
        out, total, shift = (q.new_empty(splits, *q.shape[:-1], d, dtype=torch.float32) for d in (v.shape[-1], 1, 1))
        self.launch(call, "forward", [q, k, v, out, total, shift], q, k, v, blocks[:2], sides, splits)
        # A part without visible keys has the shift -inf: its sums are zero and it fades to nothing.
        top = shift.amax(0)
        top = torch.where(top.isfinite(), top, 0.0)
        if splits == 1:
            return out[0], total[0], top
        fade = torch.exp(torch.where(shift.isfinite(), shift - top, float("-inf")))
        return (out * fade).sum(0), (total * fade).sum(0), top

    def backward(
        self, call: Call, do: Tensor, dt: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor]
    ) -> list[Tensor]:
        b, h, _, d = q.shape
        kv_heads, k_len, dv_size = k.shape[1], k.shape[2], v.shape[-1]
        dq = q.new_empty(q.shape, dtype=torch.float32)
        dk, dv = (q.new_empty(b, h, k_len, size, dtype=torch.float32) for size in (d, dv_size))
        # A root's walk over queries leaves there what its walk over keys needs of each row.
        common = [q, k, v, do, torch.empty_like(shift) if call.source.root else dt, shift]
        by_input = [torch.zeros_like(sides[at]) for at in call.wrt]
        self.launch(call, "backward_dq", [*common, dq, *by_input], q, k, v, blocks[:2], sides)
        self.launch(call, "backward_dkv", [*common, dk, dv], q, k, v, blocks[2:], sides)
        group = h // kv_heads
        return [dq.to(q.dtype), *(x.unflatten(1, (kv_heads, group)).sum(2).to(q.dtype) for x in (dk, dv)), *by_input]


TRITON = Triton()


def run(problem: Problem) -> tuple[Tensor, Stats]:
    """(out, stats) by the generated kernel; differentiable in q, k, v and the elementwise inputs."""
    sides = sides_of(problem)
    wrt = tuple(sorted(name for name, x in sides.items() if x.requires_grad and torch.is_grad_enabled()))
    source = generate(problem.mechanism, problem.mask, tuple(sorted((name, varying(x)) for name, x in sides.items())), wrt)
    block_q, block_k = blocks(problem.sizes.head_dim)
    if problem.selection is not None:
        block_q, block_k = within(block_q, problem.selection.block_q) or block_q, within(block_k, problem.selection.block_k) or block_k
    plan = layout(problem.mask, problem.sizes, block_q, block_k, problem.inputs, problem.q.device, problem.selection)
    tensors = [sides[name].float().contiguous() for name, _ in source.sides]
    dtype = problem.v.dtype if problem.v.dtype != torch.float64 else torch.float32
    q, k, v = (x.to(dtype).contiguous() for x in (problem.q, problem.k, problem.v))
    names = [name for name, _ in source.sides]
    call = Call(TRITON, source, block_q, block_k, tuple(names.index(name) for name in source.wrt))
    out, total, shift = weigh(problem, call, q, k, v, [*plan.lists(), *plan.lists(True)], tensors, names)
    return finish(problem, out, Stats(shift.detach(), total, torch.zeros_like(total)))
