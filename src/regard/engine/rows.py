"""Whole rows: for normalizers that are any function of a row of scores. Blocks of queries with all the keys they see.

Forward keeps nothing but the output; backward recomputes each block under autograd, so that memory is one block of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.position import modify
from . import reference
from .again import differentiable
from .layout import layout, static_layout
from .pairs import visible
from .problem import Problem
from .reference import Stats, repeat_heads

ROWS, ELEMENTS = 64, 1 << 20


@dataclass(frozen=True)
class Block:
    """Heads (query and key/value ones), queries and keys worked on together."""

    heads: slice
    kv_heads: slice
    rows: slice
    columns: slice


def blocks(problem: Problem) -> Iterator[Block]:
    """All blocks: keys before the first and after the last block of keys that any row sees are left out."""
    sizes = problem.sizes
    group = sizes.heads // sizes.kv_heads
    rows = max(16, min(ROWS, sizes.q_len, 4 * ELEMENTS // max(1, sizes.batch * group * sizes.k_len)))
    heads = max(1, min(sizes.kv_heads, ELEMENTS // (sizes.batch * group * rows * sizes.k_len)))
    reads = problem.mask.reads
    found = (
        layout(problem.mask, sizes, rows, 16, problem.inputs, problem.q.device)
        if reads
        else static_layout(problem.mask, sizes, rows, 16, problem.q.device)
    )
    some = (found.kind > 0).flatten(0, 1).any(0)
    for at, row in enumerate(some):
        where = row.nonzero().flatten().tolist()
        if not where:
            continue
        columns = slice(16 * where[0], min(16 * (where[-1] + 1), sizes.k_len))
        queries = slice(at * rows, min((at + 1) * rows, sizes.q_len))
        for first in range(0, sizes.kv_heads, heads):
            last = min(first + heads, sizes.kv_heads)
            yield Block(slice(first * group, last * group), slice(first, last), queries, columns)


def place(x: Tensor, block: Block) -> tuple[slice, ...]:
    """Where a block lies in an elementwise tensor (B|1, H|1, Lq|1, Lk|1)."""
    every = slice(None)
    cuts = (every, block.heads, block.rows, block.columns)
    return tuple(every if size == 1 else cut for cut, size in zip(cuts, x.shape, strict=True))


def output(problem: Problem, block: Block, parts: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Tensor:
    """One block's output; its parts of q, k and v, and inputs, are already cut."""
    q, k, v = parts
    device, offset, heads = q.device, problem.offset, block.heads.stop - block.heads.start
    at: dict[str, Any] = {
        "b": torch.arange(problem.sizes.batch, device=device)[:, None, None, None],
        "h": torch.arange(block.heads.start, block.heads.stop, device=device)[:, None, None],
        "i": torch.arange(block.rows.start, block.rows.stop, device=device)[:, None] + offset,
        "j": torch.arange(block.columns.start, block.columns.stop, device=device),
    }
    counts = None if problem.counts is None else problem.counts[place(problem.counts, block)]
    env = {**at, **inputs, "n": counts, "offset": offset, "k_len": problem.sizes.k_len}
    mechanism = problem.mechanism
    s = modify(mechanism.position, mechanism.score.pair(q, repeat_heads(k, heads), env), env)  # type: ignore[union-attr, arg-type]
    # Whole-mask tensors keep their full size for masks that index them by i and j.
    seen = visible(problem.mask, at["b"], at["h"], at["i"], at["j"], {**problem.inputs, "offset": offset, "k_len": problem.sizes.k_len})
    if problem.selection is not None:
        keep = problem.selection.keep[:, block.heads if problem.selection.keep.shape[1] > 1 else slice(None)]
        chosen = keep[:, :, (at["i"].flatten() - offset) // problem.selection.block_q]
        seen = seen & chosen[..., at["j"] // problem.selection.block_k]
    return mechanism.normalizer.weights(s, seen.expand(s.shape), env) @ repeat_heads(v, heads)


def cut(
    problem: Problem, block: Block, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """The block's part of q, k, v, and where its part of each input lies."""
    whole = {item.name for item in problem.mechanism.declared if not item.elementwise}
    where = {name: ... if name in whole or x.dim() != 4 else place(x, block) for name, x in inputs.items()}
    return (q[:, block.heads, block.rows], k[:, block.kv_heads, block.columns], v[:, block.kv_heads, block.columns]), where


class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, names: list[str], q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        given = {**problem.inputs, **dict(zip(names, inputs, strict=True))}
        for block in blocks(problem):
            parts, where = cut(problem, block, q, k, v, given)
            out[:, block.heads, block.rows] = output(problem, block, parts, {name: given[name][at] for name, at in where.items()})
        ctx.problem, ctx.names = problem, names
        ctx.save_for_backward(q, k, v, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, *inputs = ctx.saved_tensors
        problem: Problem = ctx.problem
        if torch.is_grad_enabled():
            return None, None, *twice(problem, ctx.names, grads[0], q, k, v, *inputs)
        given = {**problem.inputs, **dict(zip(ctx.names, inputs, strict=True))}
        wrt = [name for name, x in zip(ctx.names, inputs, strict=True) if x.requires_grad]
        into = [torch.zeros_like(x) for x in (q, k, v)]
        extra = {name: torch.zeros_like(given[name]) for name in wrt}
        for block in blocks(problem):
            parts, where = cut(problem, block, q, k, v, given)
            with torch.enable_grad():
                leaves = tuple(x.detach().requires_grad_() for x in parts)
                named = {name: given[name][at].detach().requires_grad_(name in extra) for name, at in where.items()}
                out = output(problem, block, leaves, named)
                found = torch.autograd.grad(
                    out, [*leaves, *[named[n] for n in wrt]], grads[0][:, block.heads, block.rows], allow_unused=True
                )
            for whole, at, grad in zip(
                [*into, *extra.values()],
                [(slice(None), block.heads, block.rows), *[(slice(None), block.kv_heads, block.columns)] * 2, *[where[n] for n in wrt]],
                found,
                strict=True,
            ):
                if grad is not None:
                    whole[at] += grad
        return None, None, *into, *[extra.get(name) for name in ctx.names]


def twice(problem: Problem, names: list[str], grad: Tensor, *tensors: Tensor) -> list[Tensor | None]:
    """Gradients with respect to q, k, v and the named inputs, which can be differentiated again."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        given = {**problem.inputs, **dict(zip(names, inputs, strict=True))}
        whole = reference.run(problem.with_(q=q, k=k, v=v, inputs=given), torch.promote_types(q.dtype, torch.float32))
        return (whole[0],)

    return differentiable(forward, tensors, (grad,))


def run(problem: Problem) -> tuple[Tensor, Stats]:
    """(out, stats); differentiable in q, k, v and every input. Stats hold nothing to merge by: rows are not sums over keys."""
    wide = torch.promote_types(problem.v.dtype, torch.float32)
    given, problem = problem.v.dtype, problem.with_(v=problem.v.to(wide))
    names = [name for name, x in problem.inputs.items() if x.is_floating_point()]
    out = Rows.apply(problem, names, problem.q, problem.k, problem.v, *[problem.inputs[n] for n in names])
    zero = torch.zeros_like(out[..., :1].detach())
    return out.to(given), Stats(zero, zero, zero)
