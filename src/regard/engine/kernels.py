"""The custom operators around generated kernels, Triton's and C's, with their fake implementations and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..algebra.mask import Mask
from ..algebra.mechanism import Weighted
from .again import differentiable
from .problem import Problem
from .reference import in_precision, unnormalised
from .symbolic import Expr, trace, var


class Backend(Protocol):
    """Who compiles and launches a source. All tensors are contiguous; `blocks` is whatever the backend made of a layout."""

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(unnormalised out, mass, shift), float32."""

    def backward(
        self, call: Call, do: Tensor, dt: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor]
    ) -> list[Tensor]:
        """[dq, dk, dv, a gradient for each side input with one], of their dtypes and shapes."""


@dataclass(frozen=True)
class Call:
    """All of a launch that is not a tensor. wrt: which side inputs have gradients."""

    backend: Backend
    source: Any
    block_q: int
    block_k: int
    wrt: tuple[int, ...] = ()


_calls: list[Call] = []  # what an operator's integer argument stands for: operators take plain arguments only
_numbers: dict[Call, int] = {}


def number_of(call: Call) -> int:
    if call not in _numbers:
        _numbers[call] = len(_calls)
        _calls.append(call)
    return _numbers[call]


@torch.library.custom_op("regard::weighted", mutates_args=())
def weighted(q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor], call: int) -> tuple[Tensor, Tensor, Tensor]:
    """(unnormalised out, mass, shift) of prepared q, k, v, all float32."""
    return _calls[call].backend.forward(_calls[call], q, k, v, blocks, sides)


@weighted.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor], call: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = q.shape[:-1]
    return tuple(q.new_empty(*shape, d, dtype=torch.float32) for d in (v.shape[-1], 1, 1))  # type: ignore[return-value]


@torch.library.custom_op("regard::weighted_backward", mutates_args=())
def weighted_backward(
    do: Tensor, dt: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor], call: int
) -> list[Tensor]:
    found = _calls[call]
    return found.backend.backward(found, do.to(v.dtype).contiguous(), dt.contiguous(), shift, q, k, v, blocks, sides)


@weighted_backward.register_fake
def _(
    do: Tensor, dt: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor], call: int
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, *[sides[at] for at in _calls[call].wrt])]


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, blocks, sides, call = inputs
    ctx.call, ctx.blocks = call, len(blocks)
    ctx.save_for_backward(output[2], q, k, v, *blocks, *sides)


def differentiate(ctx: Any, do: Tensor, dt: Tensor, _: Tensor) -> tuple[Any, ...]:
    shift, q, k, v, *rest = ctx.saved_tensors
    blocks, sides = rest[: ctx.blocks], rest[ctx.blocks :]
    dq, dk, dv, *extra = weighted_backward(do, dt, shift, q, k, v, blocks, sides, ctx.call)
    grads: list[Tensor | None] = [None] * len(sides)
    for at, grad in zip(_calls[ctx.call].wrt, extra, strict=True):
        grads[at] = grad
    return dq, dk, dv, [None] * len(blocks), grads, None


weighted.register_autograd(differentiate, setup_context=remember)


class Weighing(torch.autograd.Function):
    """The operators for a problem that is at hand: as theirs, and its gradients can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, names: Sequence[str], call: int, blocks: list[Tensor], q: Tensor, k: Tensor, v: Tensor, *sides: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, total, shift = weighted(q, k, v, blocks, list(sides), call)
        ctx.problem, ctx.names, ctx.call, ctx.blocks = problem, names, call, len(blocks)
        ctx.save_for_backward(shift, q, k, v, *blocks, *sides)
        ctx.mark_non_differentiable(shift)
        return out, total, shift

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        shift, q, k, v, *rest = ctx.saved_tensors
        blocks, sides = rest[: ctx.blocks], rest[ctx.blocks :]
        if torch.is_grad_enabled():
            return None, None, None, None, *twice(ctx.problem, ctx.names, grads[:2], shift, q, k, v, *sides)
        dq, dk, dv, *extra = weighted_backward(*grads[:2], shift, q, k, v, blocks, sides, ctx.call)
        found: list[Tensor | None] = [None] * len(sides)
        for at, grad in zip(_calls[ctx.call].wrt, extra, strict=True):
            found[at] = grad
        return None, None, None, None, dq, dk, dv, *found


def twice(problem: Problem, names: Sequence[str], grads: Sequence[Tensor], shift: Tensor, *tensors: Tensor) -> list[Tensor | None]:
    """Gradients of (out, mass) with respect to q, k, v and the side inputs, which can be differentiated again."""
    sizes = problem.sizes

    def forward(q: Tensor, k: Tensor, v: Tensor, *sides: Tensor) -> tuple[Tensor, Tensor]:
        given = {**problem.inputs, **{name: x for name, x in zip(names, sides, strict=True) if name in problem.inputs}}
        cut = problem.with_(q=q[..., : sizes.head_dim], k=k[..., : sizes.head_dim], v=v[..., : sizes.value_dim], inputs=given)
        out, total, _ = unnormalised(in_precision(cut, torch.float32), shift)
        return torch.nn.functional.pad(out, (0, v.shape[-1] - sizes.value_dim)), total

    return differentiable(forward, tensors, grads)


def weigh(
    problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor], names: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """(unnormalised out, mass, shift) of a problem by a backend's kernels."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *sides)):
        return Weighing.apply(problem, names, number_of(call), blocks, q, k, v, *sides)  # type: ignore[no-any-return, no-untyped-call]
    return weighted(q, k, v, blocks, sides, number_of(call))  # type: ignore[no-any-return]


def varying(x: Tensor) -> str:
    """Which of b, h, q, k an elementwise input depends on."""
    return "".join(letter for letter, size in zip("bhqk", x.shape, strict=True) if size > 1)


def sides_of(problem: Problem) -> dict[str, Tensor]:
    """Everything elementwise besides scores: inputs, the mask's tensors, and visible counts as n."""
    sides = {name: x for name, x in problem.inputs.items() if x.dim() == 4}
    sides.update(problem.mask.sides(problem.inputs, problem.sizes.q_len, problem.q.device))
    if problem.counts is not None:
        sides["n"] = problem.counts
    return sides


def declared_sides(mechanism: Weighted, mask: Mask) -> tuple[tuple[str, str], ...]:
    """Side inputs as if each varied in every way it declares; n varies with queries."""
    own = [(item.name, item.shape) for item in mechanism.declared if item.elementwise]
    return tuple(sorted([*own, *mask.side_shapes, ("n", "q")]))


def mask_expression(mask: Mask) -> Expr:
    """The predicate of a mask over b, h, i, j and the entries of its tensors."""
    names = [name for name, _ in mask.side_shapes]
    return trace(
        lambda b, h, i, j, *sides: mask.predicate(b, h, i, j, dict(zip(names, sides, strict=True))),
        [var(n) for n in ("b", "h", "i", "j", *names)],
        {},
    )
