"""Forward and backward over tiles, for every row-local normalizer.

Forward gives, per row, the unnormalised output o = sum w v, the mass t = sum h and the shift c; dividing o by Z(t) is left to
autograd. Backward recomputes each tile and needs only

    ds = dw/ds * gw + dh/ds * gh,   gw = do v^T,   gh = dt,

and for a root shift, by implicit differentiation, ds = dw/ds * (gw - sum(u gw) / sum(u)) with u = dw/dc.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...algebra.part import asks
from ..again import differentiable
from ..problem import Problem, divisor, reciprocal
from ..reference import Stats, unnormalised
from .backward import backward_tile
from .forward import forward_tile
from .tiles import fold, unfold
from .work import Work, score_inputs


def run(problem: Problem) -> tuple[Tensor, Stats]:
    """(out, stats); differentiable in q, k, v and every input."""
    names = [name for name, x in problem.inputs.items() if x.is_floating_point()]
    o, shift, total, count = Tiled.apply(problem, names, problem.q, problem.k, problem.v, *[problem.inputs[n] for n in names])
    return finish(problem, o, Stats(shift, total, count))


def finish(problem: Problem, o: Tensor, stats: Stats) -> tuple[Tensor, Stats]:
    """Divide the unnormalised output by Z, in the dtype of v; autograd carries the gradient into o, the mass and the inputs."""
    normalizer: Any = problem.mechanism.normalizer
    if stats.shift.requires_grad:  # o and the mass are over e^shift, which moves with the row's extreme
        fade = torch.exp(stats.shift.detach() - stats.shift)
        o, stats = o * fade, Stats(stats.shift, stats.total * fade, stats.visible)
    if normalizer.shift != "root":
        z = divisor(problem, stats.total if normalizer.mass is not None else None, stats.shift)
        if z is not None:
            o = o * reciprocal(z) if o.requires_grad or z.requires_grad else o.mul_(reciprocal(z))
    return o.to(problem.v.dtype), stats


def anchored(problem: Problem) -> bool:
    """Whether weights depend on the shift itself by more than rounding, so that gradients pass through the row's extreme score. A position
    that changes scores would stand between the two: its part, as small as `anchor`, is left out."""
    normalizer: Any = problem.mechanism.normalizer
    return (
        normalizer.shift in ("max", "max0")
        and normalizer.anchor > torch.finfo(problem.q.dtype).eps
        and problem.mechanism.score.dot  # type: ignore[union-attr]
        and getattr(problem.mechanism.position, "modify", None) is None
    )


class Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, names: list[str], q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        wide = torch.promote_types(v.dtype, torch.float32)
        counts = None if problem.counts is None else problem.counts.to(wide)
        # Inputs keep their own dtype of at least float32; halves are widened once, so every tile accumulates in float32.
        problem = problem.with_(
            q=q.detach().to(wide),
            k=k.detach().to(wide),
            v=v.detach().to(wide),
            counts=counts,
            inputs={**problem.inputs, **{n: x.detach().to(wide) for n, x in zip(names, inputs, strict=True)}},
        )
        work = Work(problem)
        n, rows = work.q.shape[0], work.q.shape[1]
        o = work.q.new_zeros(n, rows, v.shape[-1])
        total = work.q.new_zeros(n, rows, 1)
        start = float("-inf") if work.shifting else 0.0
        shift = work.q.new_full((n, rows, 1), start)
        count = work.q.new_zeros(n, rows, 1) if problem.want_count else None
        for span in work.schedule.spans():
            for tile in work.schedule.tiles(span):
                forward_tile(work, span, tile, o, total, shift, count)
        shift = torch.where(shift.isfinite(), shift, torch.zeros_like(shift))
        b = problem.sizes.batch
        o, total, shift = (unfold(x, b, work.group) for x in (o, total, shift))
        count = torch.zeros_like(total) if count is None else unfold(count, b, work.group)
        ctx.problem, ctx.names = problem, names
        ctx.save_for_backward(shift, q, k, v, *inputs)
        ctx.anchored = anchored(problem)
        ctx.mark_non_differentiable(*([count] if ctx.anchored else [shift, count]))
        return o, shift, total, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        d_o, d_shift, d_total, _ = grads
        shift, q, k, v, *inputs = ctx.saved_tensors
        problem: Problem = ctx.problem
        if torch.is_grad_enabled():
            return (
                None,
                None,
                *twice(problem, ctx.names, (d_o, d_total, d_shift if ctx.anchored else None), shift.detach(), q, k, v, *inputs),
            )
        wrt = tuple(name for name, x in zip(ctx.names, inputs, strict=True) if x.requires_grad)
        d_inputs: dict[str, Tensor] = {name: torch.zeros_like(problem.inputs[name]) for name in wrt}
        normalizer: Any = problem.mechanism.normalizer
        used = {
            name
            for f in (getattr(problem.mechanism.position, "modify", None), normalizer.weight, normalizer.mass)
            if f
            for name in asks(f, 1)
        } | score_inputs(problem)
        work = Work(problem, tuple(name for name in wrt if name in used - score_inputs(problem)))
        group = work.group
        gh = fold(d_total, group) if normalizer.mass is not None and not work.root else None
        fold_rows = {"do": fold(d_o, group), "shift": fold(shift, group), "gh": gh, "gc": fold(d_shift, group) if ctx.anchored else None}
        dq, dk, dv = (x.new_zeros(x.shape) for x in (work.q, work.k, work.v))  # in one piece, whatever the strides of x
        for span in work.schedule.spans():
            for tile in work.schedule.tiles(span):
                backward_tile(work, span, tile, fold_rows, dq, dk, dv, d_inputs)
        b = problem.sizes.batch
        d_q, d_k, d_v = unfold(dq, b, group), unfold(dk, b, 1), unfold(dv, b, 1)
        extra = [d_inputs[name].to(x.dtype) if name in d_inputs else None for name, x in zip(ctx.names, inputs, strict=True)]
        return None, None, d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), *extra


def twice(
    problem: Problem, names: Sequence[str], grads: tuple[Tensor | None, Tensor | None, Tensor | None], shift: Tensor, *tensors: Tensor
) -> list[Tensor | None]:
    """Gradients of (o, total, shift) with respect to q, k, v and the named inputs, which can be differentiated again."""
    wide = torch.promote_types(tensors[2].dtype, torch.float32)

    def forward(q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = {**problem.inputs, **{name: x.to(wide) for name, x in zip(names, inputs, strict=True)}}
        return unnormalised(problem.with_(q=q.to(wide), k=k.to(wide), v=v.to(wide), inputs=given), shift)

    return differentiable(forward, tensors, grads)
