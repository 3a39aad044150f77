"""The truth: float64, the whole matrix, simple enough to be checked by eye."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.normalizer import RowLocal
from ..algebra.part import call
from ..algebra.position import modify
from ..algebra.rows import RowWise
from ..algebra.select import Selection
from ..errors import RegardError
from .pairs import indices, visible
from .problem import Problem, divisor, reciprocal


@contextmanager
def numbers_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, PyTorch makes new floating tensors, and quotients and multiples of integers, in this dtype (None: as before)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Stats(NamedTuple):
    """What `merge` needs of a partial result: the shift, the sum of masses and the visible count of each row, (B, H, Lq, 1)."""

    shift: Tensor
    total: Tensor
    visible: Tensor


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def expand_selection(selection: Selection, q_len: int, k_len: int) -> Tensor:
    """Which pairs a selection keeps, (B, H, Lq, Lk)."""
    keep = selection.keep.repeat_interleave(selection.block_q, -2)[..., :q_len, :]
    return keep.repeat_interleave(selection.block_k, -1)[..., :k_len]


def seen_pairs(problem: Problem) -> Tensor:
    """(B, H, Lq, Lk) bool: mask and selection."""
    at = indices(problem.sizes, problem.q.device)
    env = {**problem.inputs, "offset": problem.offset, "k_len": problem.sizes.k_len}
    sizes = problem.sizes
    seen = visible(problem.mask, at["b"], at["h"], at["i"], at["j"], env)
    seen = seen.expand(sizes.batch, sizes.heads, sizes.q_len, sizes.k_len)
    if problem.selection is not None:
        seen = seen & expand_selection(problem.selection, sizes.q_len, sizes.k_len)
    return seen


def check_whole(problem: Problem, seen: Tensor) -> None:
    """Refuse masks under which a normalizer whose weights depend on other rows would read, through its keys, what a row's mask hides: each
    query must see what the next sees, or nothing of it (documents, padding)."""
    count = seen.to(torch.float32).sum(-1)
    shared = seen.to(torch.float32) @ seen.to(torch.float32).transpose(-1, -2)
    if not bool(((shared == 0) | ((shared == count[..., :, None]) & (shared == count[..., None, :]))).all()):
        raise RegardError(
            f"mask={problem.mask!r}: weights of {type(problem.mechanism.normalizer).__name__} depend on the rows of other queries, so all "
            "queries must see the same keys, or none of each other's; expected no mask, Padding() or Segments()"
        )


def scores(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    env = problem.env()
    with numbers_in(torch.float64 if q.dtype == torch.float64 else None):  # laws of indices, which are integers, as exact as the scores
        return modify(problem.mechanism.position, problem.mechanism.score.pair(q, k, env), env)  # type: ignore[union-attr, arg-type]


def shift_of(normalizer: RowLocal, s: Tensor, seen: Tensor) -> Tensor:
    """The stabilising shift c of each row; it changes no weight, so no gradient passes, unless the normalizer is anchored to it."""
    if normalizer.shift == "none":
        return torch.zeros_like(s[..., :1])
    s = s if normalizer.anchor else s.detach()
    size = s.abs() if normalizer.shift == "maxabs" else s
    top = size.masked_fill(~seen, float("-inf")).amax(-1, keepdim=True)
    top = top.clamp_min(0) if normalizer.shift == "max0" else top
    return torch.where(top.isfinite(), top, torch.zeros_like(top))


def root_of(normalizer: RowLocal, s: Tensor, seen: Tensor, env: Mapping[str, Any]) -> Tensor:
    """The c for which the weights sum to 1, by bisection; one Newton step with gradient carries the implicit derivative."""
    floor = call(normalizer.floor, env=env) if callable(normalizer.floor) else normalizer.floor
    seen = seen & (s > float("-inf"))
    live = seen.any(-1, keepdim=True)

    def total(c: Tensor) -> Tensor:
        return torch.where(seen, call(normalizer.weight, torch.where(seen, s, c), env={**env, "c": c}), 0.0).sum(-1, keepdim=True)

    with torch.no_grad():
        high = torch.where(live, s.masked_fill(~seen, float("-inf")).amax(-1, keepdim=True), 0.0)
        floor = torch.as_tensor(floor, dtype=s.dtype, device=s.device)
        low, high = high - floor.clamp_min(0), high - floor.clamp_max(0)
        for _ in range(200 if s.dtype == torch.float64 else 80):
            middle = (low + high) / 2
            above = total(middle) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        c = low

    def newton(c: Tensor, twice: bool) -> Tensor:
        with torch.enable_grad():
            leaf = c if c.requires_grad else c.detach().requires_grad_()
            (slope,) = torch.autograd.grad(total(leaf).sum(), leaf, create_graph=twice)
        slope = torch.where(slope == 0, -torch.ones_like(slope), slope)
        return c - torch.where(live, (total(c) - 1) / slope, 0.0)

    if torch.is_grad_enabled() and s.requires_grad:  # each step doubles the number of right derivatives
        return newton(newton(c, True), True)
    return newton(c, False)


def row_weights(problem: Problem, s: Tensor, seen: Tensor) -> tuple[Tensor, Stats]:
    """Weights of a row-local normalizer over whole rows, and the rows' stats."""
    normalizer = problem.mechanism.normalizer
    assert isinstance(normalizer, RowLocal)
    env = problem.env()
    root = normalizer.shift == "root"
    c = root_of(normalizer, s, seen, env) if root else shift_of(normalizer, s, seen)
    inside = torch.where(seen, s, c)  # a masked score stands at c, where every function is finite
    weights = torch.where(seen, call(normalizer.weight, inside, env={**env, "c": c}), 0.0)
    count = seen.sum(-1, keepdim=True).to(s.dtype)
    total = torch.ones_like(c)
    if not root and normalizer.mass is not None:
        total = torch.where(seen, call(normalizer.mass, inside, env={**env, "c": c}), 0.0).sum(-1, keepdim=True)
    z = None if root else divisor(problem, total if normalizer.mass is not None else None, c)
    return (weights if z is None else weights * reciprocal(z)), Stats(c, total, count)


def unnormalised(problem: Problem, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_j w_ij v_j, sum_j h_ij) of a row-local normalizer at a given shift (a root is looked for anew), as autograd follows them, and the
    shift, which autograd follows too where the normalizer is anchored to it."""
    normalizer = problem.mechanism.normalizer
    assert isinstance(normalizer, RowLocal)
    k, v = (repeat_heads(x, problem.sizes.heads) for x in (problem.k, problem.v))
    s, seen, env = scores(problem, problem.q, k), seen_pairs(problem), problem.env()
    c = root_of(normalizer, s, seen, env) if normalizer.shift == "root" else shift
    inside = torch.where(seen, s, c)
    w, h = (
        torch.where(seen, call(function, inside, env={**env, "c": c}), 0.0) if function is not None else None
        for function in (normalizer.weight, normalizer.mass)
    )
    mass = s.new_zeros(*s.shape[:-1], 1) if h is None else h.sum(-1, keepdim=True)
    return w @ v, mass, shift_of(normalizer, s, seen) if normalizer.anchor else shift  # type: ignore[operator]


def weights(problem: Problem) -> Tensor:
    """The weights themselves, (B, H, Lq, Lk), in the dtype of the problem."""
    k = repeat_heads(problem.k, problem.sizes.heads)
    s, seen = scores(problem, problem.q, k), seen_pairs(problem)
    if isinstance(problem.mechanism.normalizer, RowLocal):
        return row_weights(problem, s, seen)[0]
    if not isinstance(problem.mechanism.normalizer, RowWise):
        check_whole(problem, seen)
    return problem.mechanism.normalizer.weights(s, seen, problem.env())


def in_precision(problem: Problem, dtype: torch.dtype) -> Problem:
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in problem.inputs.items()}
    counts = None if problem.counts is None else problem.counts.to(dtype)
    return problem.with_(q=problem.q.to(dtype), k=problem.k.to(dtype), v=problem.v.to(dtype), inputs=inputs, counts=counts)


def run(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Stats]:
    """(out, stats) with everything computed in `dtype` and the matrix of weights in memory."""
    given = problem.v.dtype
    problem = in_precision(problem, dtype)
    k, v = (repeat_heads(x, problem.sizes.heads) for x in (problem.k, problem.v))
    s, seen = scores(problem, problem.q, k), seen_pairs(problem)
    normalizer = problem.mechanism.normalizer
    if isinstance(normalizer, RowLocal):
        p, stats = row_weights(problem, s, seen)
    else:
        if not isinstance(normalizer, RowWise):
            check_whole(problem, seen)
        p = normalizer.weights(s, seen, problem.env())
        zero = torch.zeros_like(p[..., :1])
        stats = Stats(zero, zero + 1, seen.sum(-1, keepdim=True).to(dtype))
    return (p @ v).to(given), stats
