"""Rounding weights to a grid so that what a layer makes of its inputs changes least: GPTQ (Frantar et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError


@dataclass(frozen=True)
class Grid:
    """How a weight is rounded. bits: 2 to 8. symmetric: levels -2^(b-1) .. 2^(b-1) - 1 times a scale; else 0 .. 2^b - 1 less a zero, times it.

    clip: scales from 1 - i / steps of the full range, i < shrink * steps, the one with the least sum of |error|^norm is taken. group: input
    channels that share a scale (None: all of a row). static: groups' scales are of the weight as it comes, not of what rounding has left of it.
    """

    bits: int = 3
    symmetric: bool = True
    clip: bool = True
    norm: float = 2.4
    steps: int = 100
    shrink: float = 0.8
    group: int | None = None
    static: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.steps < 1 or not 0 < self.shrink <= 1 or (self.group is not None and self.group < 1):
            raise RegardError(
                f"bits={self.bits}, steps={self.steps}, shrink={self.shrink}, group={self.group}: expected 2 to 8 bits, and positive numbers"
            )

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def fit(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros (rows, 1) of w (rows, columns)."""
        low, high = w.amin(1, keepdim=True).clamp_max(0), w.amax(1, keepdim=True).clamp_min(0)
        if self.symmetric:
            high = torch.maximum(low.abs(), high).clamp_min(1e-5)
            best, zero = high / self.top, torch.zeros_like(high)
        else:
            empty = (low == 0) & (high == 0)
            low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
            best = (high - low).clamp_min(1e-5) / self.top
            zero = (-low / best).round()
        least = torch.full_like(best, torch.inf)
        for i in range(int(self.shrink * self.steps) if self.clip else 0):
            p = 1 - i / self.steps
            scale = p * high / self.top if self.symmetric else p * (high - low) / self.top
            there = zero if self.symmetric else (-p * low / scale).round()
            error = (self.round(w, scale, there) - w).abs().pow(self.norm).sum(1, keepdim=True)
            better = error < least
            least, best, zero = torch.where(better, error, least), torch.where(better, scale, best), torch.where(better, there, zero)
        return best, zero

    def round(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """w on the grid, as numbers of its dtype."""
        least = -self.top - 1 if self.symmetric else 0
        return scale * (((w / scale).round() + zero).clamp(least, self.top) - zero)


@dataclass
class Rounded:
    """weight (rows, columns) on its grid; scales and zeros (rows, groups)."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor


@torch.no_grad()
def gptq(weight: Tensor, gram: Tensor, grid: Grid, damp: float = 0.01, block: int = 128, order: bool = False) -> Rounded:
    """Round weight (rows, columns) column by column, each error spread over the columns to come by the inverse of gram (columns, columns),
    the (weighed) sum of x x^T over inputs.

    damp: times the mean of its diagonal, added to it. block: columns whose errors are put off together; the numbers are the same, but that a
    group's scale is fitted to what the errors of earlier blocks left, as released. order: columns of the largest diagonal first. Inputs that
    never occur have weight 0.
    """
    columns = weight.shape[1]
    if gram.shape != (columns, columns) or damp < 0 or block < 1:
        raise RegardError(f"gram {tuple(gram.shape)}, damp={damp}, block={block}: expected {columns, columns}, 0 or more, and 1 or more")
    w, h = (
        weight.to(torch.promote_types(weight.dtype, torch.float32)).clone(),
        gram.to(torch.promote_types(gram.dtype, torch.float32)).clone(),
    )
    size = columns if grid.group is None else grid.group
    whole = grid.fit(w)  # before channels that never occur are taken out, as released
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    starts = range(0, columns, size) if grid.group is not None and grid.static else range(0)
    before = [grid.fit(w[:, start : start + size]) for start in starts]
    turn = h.diagonal().argsort(descending=True) if order else torch.arange(columns, device=w.device)
    w, h = w[:, turn], h[turn][:, turn]
    h.diagonal().add_(damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).to(w.dtype)
    out, scales, zeros = torch.empty_like(w), [], []
    scale, zero = whole
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors, settled = torch.empty_like(w[:, start:stop]), w if grid.group is None else w.clone()
        for c in range(start, stop):
            if before:
                scale, zero = before[int(turn[c]) // size]
            elif c % size == 0:
                if grid.group is not None:
                    scale, zero = grid.fit(settled[:, c : c + size])
                scales.append(scale)
                zeros.append(zero)
            out[:, c : c + 1] = grid.round(w[:, c : c + 1], scale, zero)
            error = (w[:, c] - out[:, c]) / upper[c, c]
            w[:, c:stop] -= error[:, None] * upper[c, c:stop]
            errors[:, c - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    if before:
        scales, zeros = [scale for scale, _ in before], [zero for _, zero in before]
    back = torch.empty_like(turn)
    back[turn] = torch.arange(columns, device=w.device)
    return Rounded(out[:, back].to(weight.dtype), torch.cat(scales, 1), torch.cat(zeros, 1))
