"""One tile of the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .root import solve
from .stage import hide
from .tiles import Span, Tile
from .work import Work, add_rows


def forward_tile(work: Work, span: Span, tile: Tile, o: Tensor, total: Tensor, shift: Tensor, count: Tensor | None) -> None:
    env = work.names.env(span, tile)
    shape = work.shape(span, tile)
    n, rows, group, columns = shape
    k, v = work.columns(work.k, span, tile.columns.index), work.columns(work.v, span, tile.columns.index)
    s = work.stage.scores(work.pair(work.rows(work.q, span, tile), k, span, tile, env).view(shape), env)
    hidden = work.hidden(span, tile)
    if work.root:
        env["c"] = c = solve(work, s, hidden, env)
        work.rows(shift, span, tile).copy_(c.reshape(n, rows * group, 1))
    elif work.shifting:
        env["c"] = raise_shift(work, span, tile, work.shift_of(s, hidden), o, total, shift)
    w, h = work.stage.weights(s, env)
    if hidden is not None:
        hide(w, hidden)
        if h is not None and h is not w:
            hide(h, hidden)
    w = work.weigh_out(tile, w)
    h = h if h is None or h is w else work.weigh_out(tile, h)
    if count is not None:
        seen = torch.full((n, rows, group, 1), float(columns), dtype=s.dtype, device=s.device)
        if hidden is not None:
            seen -= hidden.expand(*shape[:3], hidden.shape[-1]).sum(-1, keepdim=True)
        elif tile.columns.stand_ins and tile.columns.exists is not None:
            seen -= (~tile.columns.exists).sum(-1)[:, None, None, None]
        seen = seen.view(n, rows * group, 1)
        add_rows(count, span, tile, work.group, seen)
    if h is not None and not work.root:
        add_rows(total, span, tile, work.group, h.sum(-1).view(n, rows * group, 1))
    add_rows(o, span, tile, work.group, work.product("out", w.view(n, rows * group, columns), v))


def raise_shift(work: Work, span: Span, tile: Tile, top: Tensor, o: Tensor, total: Tensor, shift: Tensor) -> Tensor:
    """Raise the rows' shift to at least `top` and fade what they have gathered so far; returns the shift, finite."""
    n, rows, group, _ = work.shape(span, tile)
    views = [work.rows(x, span, tile) for x in (o, total, shift)]
    old = views[2].view(n, rows, group, 1)
    new = torch.maximum(old, top)
    c = torch.where(new.isfinite(), new, 0.0)
    fade = torch.exp(torch.where(old == new, 0.0, old - c)).reshape(views[2].shape)
    faded = (views[0].mul_(fade), views[1].mul_(fade), views[2].copy_(new.reshape(views[2].shape)))
    if not isinstance(tile.rows, slice):  # gathered rows are copies: write them back
        for into, value in zip((o, total, shift), faded, strict=True):
            into[span.queries, tile.rows] = value
    return c
