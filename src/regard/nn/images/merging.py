"""Tokens of a grid that are alike, merged and put back: bipartite soft matching (Bolya and Hoffman, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import RegardError


def rows(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True)
class Matching:
    """Which tokens merge into which. stays (B, D): tokens that are merged into; moves (B, S): the others, the likest first; into (B, S): the place
    in `stays` of the token that each is likest to."""

    stays: Tensor
    moves: Tensor
    into: Tensor

    def merge(self, x: Tensor, count: int) -> Tensor:
        """x (B, N, C) -> (B, N - count, C): tokens that are left alone, then means of those merged with each other. At most S merge."""
        count = min(count, self.moves.shape[1])
        moved, into = rows(x, self.moves), self.into[:, :count, None].expand(-1, -1, x.shape[-1])
        kept = rows(x, self.stays).scatter_reduce(1, into, moved[:, :count], "mean")
        return torch.cat((moved[:, count:], kept), 1)

    def unmerge(self, y: Tensor, count: int) -> Tensor:
        """y (B, N - count, C) -> (B, N, C): every token gets what the one it was merged into has."""
        count = min(count, self.moves.shape[1])
        alone = self.moves.shape[1] - count
        out = y.new_empty(len(y), self.stays.shape[1] + self.moves.shape[1], y.shape[2])
        kept = y[:, alone:]
        for at, values in (
            (self.stays, kept),
            (self.moves[:, count:], y[:, :alone]),
            (self.moves[:, :count], rows(kept, self.into[:, :count])),
        ):
            out.scatter_(1, at[..., None].expand_as(values), values)
        return out


@torch.no_grad()
def match(x: Tensor, shape: tuple[int, int], stride: tuple[int, int] = (2, 2), draw: Tensor | None = None) -> Matching:
    """Tokens x (B, H W, C), row by row, matched by the cosine of x. One token of every complete stride[0] x stride[1] region stays; draw
    (H // stride[0], W // stride[1]): which, counted row by row (None: the first). Tokens of incomplete regions move."""
    (h, w), (sy, sx) = shape, stride
    if x.shape[1] != h * w or not 1 <= sy <= h or not 1 <= sx <= w or sy * sx < 2:
        raise RegardError(
            f"x {tuple(x.shape)}, shape={shape}, stride={stride}: expected (B, H W, C) and a region of several tokens that fits"
        )
    regions = h // sy, w // sx
    draw = torch.zeros(regions, dtype=torch.long) if draw is None else draw
    if draw.shape != regions or bool((draw < 0).any()) or bool((draw >= sy * sx).any()):
        raise RegardError(f"draw {tuple(draw.shape)}: expected {regions}, numbers below {sy * sx}")
    draw = draw.to(x.device)
    row, column = (torch.arange(n, device=x.device) * s for n, s in zip(regions, stride, strict=True))
    stays = ((row[:, None] + draw // sx) * w + column + draw % sx).flatten().sort().values
    others = torch.ones(h * w, dtype=torch.bool, device=x.device)
    others[stays] = False
    moves, unit = others.nonzero()[:, 0], normalize(x, dim=-1)
    near = (unit[:, moves] @ unit[:, stays].mT).max(-1)
    order = near.values.argsort(dim=-1, descending=True)
    return Matching(stays.expand(len(x), -1), moves[order], near.indices.gather(1, order))
