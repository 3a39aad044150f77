"""Sums and maxima over the visible part of rows: what functions of whole rows are written with. Empty rows give 0, never NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .normalizer import Normalizer
from .part import Function, Input, call, described


@described
class RowWise(Normalizer):
    """p_i = function(s_i, seen_i): any plain function of whole rows of scores.

    function(s, seen, ...) gets scores (..., Lq, Lk), 0 where hidden (by the mask, or by a score of -inf), the bool tensor of visible pairs, and by name any of n (visible
    count), i, j, h, b and declared inputs; it returns weights, of which hidden ones are set to 0. Runs in blocks of rows, each with
    all the keys it sees, and is recomputed in the backward pass: memory is one block, never Lq x Lk.
    """

    function: Function
    inputs: tuple[Input, ...] = ()

    @property
    def row_local(self) -> bool:
        return True

    def weights(self, s: Tensor, visible: Tensor, env: Any) -> Tensor:
        visible = visible.expand_as(s) & (s > float("-inf"))
        return torch.where(visible, call(self.function, torch.where(visible, s, 0.0), visible, env=env), 0.0)


def row_sum(x: Tensor, seen: Tensor) -> Tensor:
    """Sum over visible entries, (..., 1)."""
    return torch.where(seen, x, 0.0).sum(-1, keepdim=True)


def row_count(seen: Tensor, like: Tensor) -> Tensor:
    """Visible entries of each row, at least 1."""
    return seen.sum(-1, keepdim=True).clamp_min(1).to(like.dtype)


def row_mean(x: Tensor, seen: Tensor) -> Tensor:
    return row_sum(x, seen) / row_count(seen, x)


def row_max(x: Tensor, seen: Tensor) -> Tensor:
    """Largest visible entry, (..., 1); 0 for an empty row."""
    return torch.where(seen.any(-1, keepdim=True), x.masked_fill(~seen, float("-inf")).amax(-1, keepdim=True), 0.0)


def row_softmax(s: Tensor, seen: Tensor) -> Tensor:
    """Softmax over visible entries; 0 elsewhere and in empty rows."""
    e = torch.where(seen, torch.exp(torch.where(seen, s - row_max(s, seen).detach(), 0.0)), 0.0)
    return e / e.sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)


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
