"""Root shifts: the c of each row for which its weights sum to 1 (sparsemax, entmax, any falling weight)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...algebra.part import call
from .stage import hide

if TYPE_CHECKING:
    from .run import Work

TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-15}
STEPS = {torch.float32: 40, torch.float64: 90}


def solve(work: Work, s: Tensor, hidden: Tensor | None, env: dict[str, Any]) -> Tensor:
    """Newton's method kept inside a shrinking bracket, over complete rows; a bisection step where Newton leaves it.

    For convex weights (sparsemax, 1 < alpha <= 2) Newton from the left never leaves the bracket and takes a few steps.
    """
    if hidden is not None:
        hide(s, hidden, float("-inf"))
    top = s.amax(-1, keepdim=True)
    live = top > float("-inf")
    high = torch.where(live, top, 0.0)
    floor = work.normalizer.floor
    floor = call(floor, env=env) if callable(floor) else floor
    low = high - floor
    c = low
    few = s
    for step in range(STEPS[s.dtype]):
        if step == 2 and work.problem.position_free:
            few = packed(s, low)  # two steps have raised the lowest possible threshold above most scores
        w, u = work.stage.weight_and_slope(few, {**env, "c": c})
        excess = w.sum(-1, keepdim=True) - 1
        slope = u.sum(-1, keepdim=True)
        low, high = torch.where(excess >= 0, c, low), torch.where(excess >= 0, high, c)
        newton = c - excess / torch.where(slope == 0, -1.0, slope)
        inside = (newton >= low) & (newton <= high) & newton.isfinite()
        new = torch.where(inside, newton, (low + high) / 2)
        if bool(((new - c).abs() <= TOLERANCE[s.dtype] * (1 + c.abs())).all()):
            c = new
            break
        c = new
    if hidden is not None:  # weights of masked scores are then exactly zero, and finite
        hide(s, hidden, torch.finfo(s.dtype).min / 4)
    return torch.where(live, c, 0.0)


def packed(s: Tensor, low: Tensor) -> Tensor:
    """The scores above `low`, the only ones that can weigh anything, moved to the front of shorter rows; -inf fills them up.

    Given back as they are where rows would hardly get shorter.
    """
    columns = s.shape[-1]
    index = (s > low).flatten().nonzero().squeeze(1)
    if index.numel() * 4 > s.numel():
        return s
    row = index // columns
    counts = torch.bincount(row, minlength=s.numel() // columns)
    longest = max(1, int(counts.max()))
    if longest * 4 > columns:
        return s
    place = torch.arange(index.numel(), device=s.device) - (counts.cumsum(0) - counts)[row]
    out = s.new_full((counts.numel(), longest), float("-inf"))
    out[row, place] = s.flatten()[index]
    return out.view(*s.shape[:-1], longest)
