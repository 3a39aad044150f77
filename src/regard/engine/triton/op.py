"""The custom operators around the generated kernels, with their fake implementations and autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...algebra.mechanism import Weighted
from ..layout import Layout, layout
from ..problem import Problem
from ..reference import Stats
from ..tiled.run import finish
from ..tiled.tiles import mask_inputs
from .generate import Source, compiled, generate

_calls: list[tuple[Weighted, Any, Source, Any]] = []  # what an operator's integer argument stands for
_numbers: dict[Any, int] = {}


def number_of(problem: Problem, source: Source) -> int:
    """The number under which a (mechanism, mask, source, sizes) is known to the operators, whose arguments must be plain."""
    key = (problem.mechanism, problem.mask, source, problem.sizes)
    if key not in _numbers:
        _numbers[key] = len(_calls)
        _calls.append((problem.mechanism, problem.mask, source, problem.sizes))
    return _numbers[key]


def blocks(head_dim: int) -> tuple[int, int]:
    return (64, 64) if head_dim <= 128 else (32, 32)


def lists_of(blocks: Layout, transposed: bool) -> tuple[Tensor, Tensor]:
    """For each row (or column) of blocks, the entries to visit: 2 * block + (1 if full), visible ones first; and how many."""
    kind = blocks.kind.transpose(-1, -2) if transposed else blocks.kind
    entry = 2 * torch.arange(kind.shape[-1], device=kind.device) + (kind == 2)
    order = torch.sort((kind == 0).to(torch.int8), dim=-1, stable=True).indices
    return entry.expand(kind.shape).gather(-1, order).to(torch.int32).contiguous(), (kind > 0).sum(-1).to(torch.int32).contiguous()


def power_of_two(n: int) -> int:
    return max(16, 1 << math.ceil(math.log2(n)))


def launch(
    kernel: Any, grid: tuple[int, int], tensors: list[Tensor], call: int, layout: Layout, sides: list[Tensor], transposed: bool
) -> None:
    _, _, source, sizes = _calls[call]
    lists, lengths = lists_of(layout, transposed)
    strides = []
    for (_, letters), x in zip(source.sides, sides, strict=True):
        strides += [x.stride("bhqk".index(letter)) for letter in letters]

    def stride(x: Tensor, dim: int) -> int:
        return x.stride(dim) if x.shape[dim] > 1 else 0

    kernel[grid](
        *tensors,
        *sides,
        lists,
        lengths,
        sizes.q_len,
        sizes.k_len,
        sizes.k_len - sizes.q_len,
        stride(lists, 0),
        stride(lists, 1),
        lists.stride(2),
        stride(lengths, 0),
        stride(lengths, 1),
        *strides,
        HEADS=sizes.heads,
        GROUP=sizes.heads // sizes.kv_heads,
        BLOCK_M=layout.block_q,
        BLOCK_N=layout.block_k,
        D=sizes.head_dim,
        DV=sizes.value_dim,
        D_PAD=power_of_two(sizes.head_dim),
        DV_PAD=power_of_two(sizes.value_dim),
    )


def layout_for(call: int, kind: Tensor) -> Layout:
    return Layout(kind, *blocks(_calls[call][3].head_dim))


@torch.library.custom_op("regard::weighted", mutates_args=())
def weighted(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, sides: list[Tensor], call: int) -> tuple[Tensor, Tensor, Tensor]:
    """(unnormalised out, mass, shift) of prepared q, k, v, all float32."""
    source = _calls[call][2]
    b, h, length, _ = q.shape
    out = q.new_empty(b, h, length, v.shape[-1], dtype=torch.float32)
    total, shift = (q.new_empty(b, h, length, 1, dtype=torch.float32) for _ in range(2))
    plan = layout_for(call, kind)
    launch(compiled(source)["forward"], (-(-length // plan.block_q), b * h), [q, k, v, out, total, shift], call, plan, sides, False)
    return out, total, shift


@weighted.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, sides: list[Tensor], call: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = q.shape[:-1]
    return tuple(q.new_empty(*shape, d, dtype=torch.float32) for d in (v.shape[-1], 1, 1))  # type: ignore[return-value]


@torch.library.custom_op("regard::weighted_backward", mutates_args=())
def weighted_backward(
    do: Tensor, dt: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: Tensor, sides: list[Tensor], call: int
) -> tuple[Tensor, Tensor, Tensor]:
    source = _calls[call][2]
    b, h, length, d = q.shape
    kv_heads, k_len, dv_size = k.shape[1], k.shape[2], v.shape[-1]
    dq = q.new_empty(q.shape, dtype=torch.float32)
    dk = q.new_empty(b, h, k_len, d, dtype=torch.float32)
    dv = q.new_empty(b, h, k_len, dv_size, dtype=torch.float32)
    kernels, plan = compiled(source), layout_for(call, kind)
    common = [q, k, v, do.to(v.dtype).contiguous(), dt.contiguous(), shift]
    launch(kernels["backward_dq"], (-(-length // plan.block_q), b * h), [*common, dq], call, plan, sides, False)
    launch(kernels["backward_dkv"], (-(-k_len // plan.block_k), b * h), [*common, dk, dv], call, plan, sides, True)
    group = h // kv_heads
    return dq.to(q.dtype), dk.unflatten(1, (kv_heads, group)).sum(2).to(k.dtype), dv.unflatten(1, (kv_heads, group)).sum(2).to(v.dtype)


@weighted_backward.register_fake
def _(
    do: Tensor, dt: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: Tensor, sides: list[Tensor], call: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, kind, sides, call = inputs
    ctx.call, ctx.sides = call, len(sides)
    ctx.save_for_backward(output[2], q, k, v, kind, *sides)


def differentiate(ctx: Any, do: Tensor, dt: Tensor, _: Tensor) -> tuple[Any, ...]:
    shift, q, k, v, kind, *sides = ctx.saved_tensors
    return *weighted_backward(do, dt, shift, q, k, v, kind, sides, ctx.call), None, [None] * ctx.sides, None


weighted.register_autograd(differentiate, setup_context=remember)


def varying(x: Tensor) -> str:
    """Which of b, h, q, k an elementwise input depends on."""
    return "".join(letter for letter, size in zip("bhqk", x.shape, strict=True) if size > 1)


def run(problem: Problem) -> tuple[Tensor, Stats]:
    """(out, stats) by the generated kernel; differentiable in q, k and v."""
    sides = {name: x for name, x in problem.inputs.items() if x.dim() == 4}
    if problem.counts is not None:
        sides["n"] = problem.counts
    source = generate(problem.mechanism, problem.mask, tuple(sorted((name, varying(x)) for name, x in sides.items())))
    block_q, block_k = blocks(problem.sizes.head_dim)
    plan = layout(problem.mask, problem.sizes, block_q, block_k, {}, problem.q.device, problem.selection)
    tensors = [sides[name].float().contiguous() for name, _ in source.sides]
    dtype = problem.v.dtype if problem.v.dtype != torch.float64 else torch.float32
    q, k, v = (x.to(dtype).contiguous() for x in (problem.q, problem.k, problem.v))
    out, total, shift = weighted(q, k, v, plan.kind, tensors, number_of(problem, source))
    assert not mask_inputs(problem)
    return finish(problem, out, Stats(shift.detach(), total, torch.zeros_like(total)))
