"""Root shifts: the c of each row for which its weights sum to 1 (sparsemax, entmax, any falling weight)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ...algebra.normalizer import RowLocal
from ...algebra.part import call
from ...algebra.rows import packed
from ..exported import holds
from ..problem import Problem
from .stage import Opaque, Traced, hide

TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-15}
STEPS = {torch.float32: 40, torch.float64: 90}
CLOSE, STEEP = 4, 64  # tolerances by which a root may be missed, and slopes of a row's sum that are taken for steep
GROUP = 16  # scores of which only the largest is looked at to raise the lower bound


class Rooted(Protocol):
    """What a root is sought for: a call, its normalizer, and its weights as functions of a score."""

    problem: Problem
    normalizer: RowLocal
    stage: Traced | Opaque


def solve(work: Rooted, s: Tensor, hidden: Tensor | None, env: dict[str, Any]) -> Tensor:
    """The root of every row, over complete rows.

    The maxima of groups of scores are a subset of the row, and fewer terms have a smaller root: solving on them gives a lower
    bound close to the root. Scores below a lower bound weigh nothing, so the row is then solved on the few above it.
    """
    if hidden is not None:
        hide(s, hidden, float("-inf"))
    top = s.amax(-1, keepdim=True)
    live = top > float("-inf")
    high = torch.where(live, top, 0.0)
    given = work.normalizer.floor
    floor = torch.as_tensor(call(given, env=env) if callable(given) else given, dtype=s.dtype, device=s.device)
    low, high = high - floor.clamp_min(0), high - floor.clamp_max(0)
    few = s
    if work.problem.position_free and s.shape[-1] >= 16 * GROUP:
        groups = s.shape[-1] // GROUP
        largest = s[..., : groups * GROUP].unflatten(-1, (GROUP, groups)).amax(-2)
        bound = newton(work, largest, low, high, env, 1e-4)
        low = torch.maximum(low, bound - 1e-3 * (high - low))
        few = packed(s, low + floor.clamp_max(0))
    c = newton(work, few, low, high, env, TOLERANCE[s.dtype])
    if hidden is not None:  # weights of masked scores are then exactly zero, and finite
        hide(s, hidden, torch.finfo(s.dtype).min / 4)
    return torch.where(live, c, 0.0)


def newton(work: Rooted, s: Tensor, low: Tensor, high: Tensor, env: dict[str, Any], tolerance: float) -> Tensor:
    """Newton's method from `low`, kept inside a shrinking bracket; a bisection step where it leaves it.

    For convex weights (sparsemax, 1 < alpha <= 2) steps from the left never leave the bracket, and few are needed.
    """
    c, last = low, torch.full_like(low, float("inf"))
    for _ in range(STEPS[s.dtype]):
        w, u = work.stage.weight_and_slope(s, {**env, "c": c})
        excess = w.sum(-1, keepdim=True) - 1
        slope = u.sum(-1, keepdim=True)
        low, high = torch.where(excess >= 0, c, low), torch.where(excess >= 0, high, c)
        step = c - excess / torch.where(slope == 0, -1.0, slope)
        near = tolerance * (1 + c.abs())
        # Where weights rise steeply (alpha > 2) steps may be tiny far from the root, or go back and forth around it.
        noise = CLOSE * near * (1 + slope.abs().clamp_max(STEEP))  # of the excess, from the rounding of c
        stuck = (excess.abs() > noise) & (((step - c).abs() <= near) | (excess.abs() > last / 2))
        last = excess.abs()
        inside = (step >= low) & (step <= high) & step.isfinite() & ~stuck
        new = torch.where(inside, step, (low + high) / 2)
        moved = ((new - c).abs() > near) & (high - low > near)
        c = new
        if holds(~moved, False):
            break
    return c
