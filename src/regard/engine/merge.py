"""Joining partial results over split keys: one associative rule for every row-local normalizer that is not a root."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.mechanism import Weighted
from ..algebra.normalizer import RowLocal
from ..algebra.part import call
from ..errors import RegardError
from .problem import reciprocal
from .reference import Stats


def merge(mechanism: Weighted, parts: Sequence[tuple[Tensor, Stats]], **inputs: Tensor) -> tuple[Tensor, Stats]:
    """Join `(out, stats)` of the same queries over disjoint sets of keys into `(out, stats)` over all of them.

    out (B, H, Lq, Dv); stats rows (B, H, Lq, 1). With c* = max c: masses and numerators are scaled by exp(c - c*) and added,
    which is log-sum-exp merging for softmax and a plain sum for additive weights. `inputs`: those the divisor reads (sinks).
    Weights that read the visible count n must have been computed with the whole row's n.
    """
    normalizer = mechanism.normalizer
    if not isinstance(normalizer, RowLocal) or normalizer.shift == "root":
        raise RegardError("partial results of this normalizer cannot be merged: its rows are not sums over keys")
    if not parts:
        raise RegardError("merge needs at least one partial result")

    def divide(total: Tensor, shift: Tensor, count: Tensor) -> Tensor | None:
        if not normalizer.normalised:
            return None
        if normalizer.divide is None:
            return total
        canonical = {name: x.reshape(1, -1, 1, 1) if x.dim() == 1 else x for name, x in inputs.items()}
        return call(normalizer.divide, total, env={**canonical, "c": shift, "n": count})

    empty = [stats.visible == 0 for _, stats in parts]
    shifts = [torch.where(none, float("-inf"), stats.shift) for none, (_, stats) in zip(empty, parts, strict=True)]
    shift = torch.stack(shifts).amax(0)
    shift = torch.where(shift.isfinite(), shift, 0.0)
    total: Tensor = torch.zeros_like(shift)
    count: Tensor = torch.zeros_like(shift)
    weights = []
    for _, stats in parts:
        fade = torch.where(stats.visible == 0, 0.0, torch.exp(torch.where(stats.visible == 0, 0.0, stats.shift - shift)))
        z = divide(stats.total, stats.shift, stats.visible)
        weights.append(fade if z is None else fade * z)
        total = total + stats.total * fade
        count = count + stats.visible
    z = divide(total, shift, count)
    share = 1.0 if z is None else reciprocal(z)
    out = torch.zeros((), device=shift.device, dtype=shift.dtype)
    for weight, (piece, _) in zip(weights, parts, strict=True):  # one pass over each part: rows are weighed, not rescaled twice
        out = torch.addcmul(out, piece.to(shift.dtype), weight * share)
    return out.to(parts[0][0].dtype), Stats(shift, total, count)
