"""One tile of the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import reciprocal
from .stage import hide
from .tiles import Span, Tile
from .work import Work, add_columns, add_rows, score_inputs


def backward_tile(
    work: Work, span: Span, tile: Tile, per_row: dict[str, Any], dq: Tensor, dk: Tensor, dv: Tensor, d_inputs: dict[str, Tensor]
) -> None:
    env = work.names.env(span, tile)
    shape = work.shape(span, tile)
    n, rows, group, columns = shape
    q = work.rows(work.q, span, tile)
    k = work.columns(work.k, span, tile.columns.index)
    do = work.rows(per_row["do"], span, tile)
    if work.root or work.shifting:
        env["c"] = work.rows(per_row["shift"], span, tile).view(n, rows, group, 1)
    hidden = work.hidden(span, tile)
    raw = work.pair(q, k, span, tile, env).view(shape)
    gw = work.product("pulled", do, work.turned_columns("v", work.v, span, tile.columns.index)).view(shape)
    gh = None if per_row["gh"] is None else work.rows(per_row["gh"], span, tile).view(n, rows, group, 1)
    if work.root:
        moved = work.stage.scores(raw.clone(), env)  # the stage may overwrite what it is given
        _, u = work.stage.weight_and_slope(moved, env)
        if hidden is not None:
            u = hide(u.clone(), hidden)
        mass = u.sum(-1, keepdim=True)
        gw -= (u * gw).sum(-1, keepdim=True) * reciprocal(mass)
    extreme = None if per_row["gc"] is None else at_extreme(work, raw, env["c"], hidden)
    w, ds, extra = work.stage.pullback(raw, env, gw, gh, hidden)
    if extreme is not None:
        ds = ds + extreme * work.rows(per_row["gc"], span, tile).view(n, rows, group, 1)
    w, ds, extra = work.weigh_out(tile, w), work.weigh_out(tile, ds), [work.weigh_out(tile, x) for x in extra]
    w, ds = w.reshape(n, rows * group, columns), ds.reshape(n, rows * group, columns)
    for name, grad in zip([name for name in d_inputs if name in stage_names(work)], extra, strict=True):
        work.names.scatter(name, d_inputs[name], grad, span, tile)
    if work.problem.mechanism.score.dot:  # type: ignore[union-attr]
        dq_part, dk_part = work.product("dq", ds, k), work.product("dk", ds.transpose(1, 2), q)
    else:
        dq_part, dk_part = pair_gradients(work, q, k, ds, env, span, tile, d_inputs)
    add_rows(dq, span, tile, group, dq_part)
    add_columns(dk, span, tile, dk_part)
    add_columns(dv, span, tile, work.product("dv", w.transpose(1, 2), do))


def at_extreme(work: Work, s: Tensor, c: Tensor, hidden: Tensor | None) -> Tensor:
    """Where a tile's scores are their row's largest, up to the rounding of a product formed anew."""
    near = (s >= c - 64 * torch.finfo(s.dtype).eps * (1 + c.abs())) & (c > 0 if work.normalizer.shift == "max0" else True)
    return (near if hidden is None else hide(near, hidden, False)).to(s.dtype)


def stage_names(work: Work) -> set[str]:
    return {getattr(x, "args", [x])[0] if not isinstance(x, str) else x for x in work.stage.wrt}


def pair_gradients(
    work: Work, q: Tensor, k: Tensor, ds: Tensor, env: dict[str, Any], span: Span, tile: Tile, d_inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient of a score that is not the plain dot product, by autograd on the tile."""
    names = [name for name in d_inputs if name in score_inputs(work.problem)]
    with torch.enable_grad():
        leaves = {name: env[name].detach().requires_grad_() for name in names}
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        s = work.pair(q, k, span, tile, {**env, **leaves})
        dq, dk, *rest = torch.autograd.grad(s, [q, k, *leaves.values()], ds, allow_unused=True)
    for name, grad in zip(names, rest, strict=True):
        if grad is not None:
            work.names.scatter(name, d_inputs[name], grad, span, tile)
    return torch.zeros_like(q) if dq is None else dq, torch.zeros_like(k) if dk is None else dk
