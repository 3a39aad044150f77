"""Thresholds of alpha-entmax by Halley's method kept inside a bisection bracket, and the tiles that lie above them (AdaSplash)."""

from __future__ import annotations

import torch
from torch import Tensor

from .mask import positive
from .part import described
from .rows import packed, row_count, row_max
from .select import Selection, Selector, View

PROBES = 4
MARGIN = 1e-6  # a converged iterate lies on the bracket's edge: with strict bounds it would be thrown away


def halley(s: Tensor, seen: Tensor, alpha: float | Tensor, iterations: int) -> Tensor:
    """tau (..., 1) with sum_j ((alpha - 1) s_j - tau)_+^(1 / (alpha - 1)) = 1 over the seen entries of each row; no gradient.

    From the middle of [max - 1, max - n^(1 - alpha)]; each step takes f, f', f'' from sums of powers c, c - 1, c - 2, c = 1 / (alpha - 1).
    """
    with torch.no_grad():
        x = (alpha - 1) * s.detach()
        c = 1 / (alpha - 1)
        top = row_max(x, seen)
        high, low = top - row_count(seen, x) ** (1 - alpha), top - 1
        tau = (high + low) / 2
        x = packed(x.masked_fill(~seen, float("-inf")), low)  # what lies below max - 1 weighs nothing, whatever tau is
        for _ in range(iterations):
            above = x > tau
            gap = torch.where(above, x - tau, 1.0)
            sums = [torch.where(above, gap**power, 0.0).sum(-1, keepdim=True) for power in (c, c - 1, c - 2)]
            f, slope, bend = sums[0] - 1, -c * sums[1], c * (c - 1) * sums[2]
            low, high = torch.where(f > 0, tau, low), torch.where(f > 0, high, tau)
            step = tau - 2 * f * slope / (2 * slope * slope - f * bend)
            inside = (step > low - MARGIN) & (step < high + MARGIN)
            tau = torch.where(inside, step, (low + high) / 2)
        return tau


@described
class ActiveTiles(Selector):
    """The tiles of block_size x block_size that hold a weight above zero under alpha-entmax; the others change nothing when left out.

    iterations: Halley steps for each row's threshold; `slack` below it a tile still counts, for the error that is left.
    Where more than `worthwhile` of the tiles would stay (in a few probes, or in all), none is left out: following tiles would cost more than it saves.
    """

    alpha: float = 1.5
    block_size: int = 64
    iterations: int = 8
    slack: float = 1e-5
    worthwhile: float = 0.5

    def __post_init__(self) -> None:
        positive(self, "block_size", "iterations")

    def select(self, q: Tensor, k: Tensor, view: View) -> Selection | None:
        size, k = self.block_size, k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        count = -(-q.shape[-2] // size)

        def tiles(block: int) -> Tensor:
            """(B, H, key blocks): those of a block of queries that hold weight."""
            part = q[..., block * size : (block + 1) * size, :]
            s = part @ k.transpose(-1, -2)
            seen = view.visible(torch.arange(block * size, block * size + part.shape[-2], device=q.device) + view.first).expand_as(s)
            tau = halley(s, seen, self.alpha, self.iterations)
            on = seen & ((self.alpha - 1) * s > tau - self.slack)
            return torch.nn.functional.pad(on, (0, -on.shape[-1] % size)).unflatten(-1, (-1, size)).any(-1).any(-2)

        # A few blocks tell whether looking at all of them can pay.
        probes = {round((at + 0.5) * (count - 1) / PROBES) for at in range(PROBES)}
        found = {block: tiles(block) for block in probes}
        if float(torch.stack(list(found.values())).float().mean()) > self.worthwhile:
            return None
        whole = Selection(torch.stack([found[at] if at in found else tiles(at) for at in range(count)], -2), size, size)
        return whole if whole.density <= self.worthwhile else None
