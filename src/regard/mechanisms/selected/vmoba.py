"""VMoBA: MoBA for video, over blocks of frames, of tiles and of cubes in turn (id 266; Wu et al., 2025).

layer l cuts the grid by partition l mod 3; g[w, t] = mean(K_w).q_t;  within a scope, g' = (g - min) / (max - min)
the own block, and the fewest others by falling g' whose share of sum g' lifts the kept share to the threshold
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...algebra import Chosen, Program, Selection, View, Weighted, bind
from ...algebra.blocks import heads_of, pooled
from ...algebra.permute import tiles
from ...catalog.registry import register
from ...engine.composed import Call
from ...errors import RegardError

SCOPES = ("query_head", "head_global", "overall", "block")
Grid = tuple[int, ...]


@register("vmoba")
def vmoba(
    grid: Grid | None = None,
    tile: Grid = (1, 8, 8),
    layer: int = 0,
    mode: str = "threshold",
    threshold: float = 0.25,
    top_k: int = 3,
    scope: str = "query_head",
) -> Program:
    """grid: frames, height, width (None: a line cut in blocks of prod(tile)). tile: frames, height, width of a block; layer l keeps all of it
    (l mod 3 = 2), only its frames (0) or only height and width (1). mode: "threshold", or "topk": top_k pairs a query over the scope.
    scope: pairs that are ranked together: a query's, a head's, all, or a block's."""
    if mode not in ("threshold", "topk") or scope not in SCOPES:
        raise RegardError(f"mode={mode!r}, scope={scope!r}; expected threshold or topk, and one of {', '.join(SCOPES)}")
    size = partition(grid, tile, layer)
    constants = {"grid": grid, "tile": size, "mode": mode, "threshold": threshold, "top_k": top_k, "scope": scope}
    return Program(bind(vmoba_program, **constants))


def partition(grid: Grid | None, tile: Grid, layer: int) -> Grid:
    """The tile of a layer: 1-D (whole frames), 2-D (spatial tiles over all frames) or 3-D."""
    if grid is None:
        return (math.prod(tile),)
    return ((tile[0], *grid[1:]), (grid[0], *tile[1:]), tile)[layer % 3]


def grouped(x: Tensor, scope: str) -> Tensor:
    """(B, H, L, n) -> (..., pairs of one scope)."""
    return {"query_head": x, "head_global": x.flatten(2), "overall": x.flatten(1), "block": x.transpose(-1, -2)}[scope]


def ungrouped(x: Tensor, like: Tensor, scope: str) -> Tensor:
    return x.transpose(-1, -2) if scope == "block" else x.reshape(like.shape)


def choose(gate: Tensor, own: Tensor, mode: str, threshold: float, top_k: int, scope: str) -> Tensor:
    """(B, H, L, n) bool: own blocks and what the mode adds, at least one other pair a group."""
    g, mine = grouped(gate, scope), grouped(own.expand(gate.shape), scope)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    share = (g - low) / (high - low).clamp_min(1e-30)
    share = share / share.sum(-1, keepdim=True).clamp_min(1e-30)
    need = (threshold - (share * mine).sum(-1, keepdim=True)).clamp_min(0)
    ordered, ranked = share.masked_fill(mine, -1.0).sort(dim=-1, descending=True, stable=True)
    others = ordered >= 0
    if mode == "topk":
        queries = g.shape[-1] // gate.shape[-1] if scope != "block" else g.shape[-1] / gate.shape[-1]
        chosen = torch.arange(g.shape[-1], device=g.device) < max(1, round(top_k * queries)) - mine.sum(-1, keepdim=True)
    else:
        chosen = (ordered.cumsum(-1) - ordered < need) if threshold < 1 else torch.ones_like(others)
    chosen = (chosen | (torch.arange(g.shape[-1], device=g.device) == 0)) & others
    return ungrouped(torch.zeros_like(chosen).scatter_(-1, ranked, chosen) | mine, gate, scope)


def vmoba_plan(q: Tensor, k: Tensor, view: View, *, size: int, mode: str, threshold: float, top_k: int, scope: str) -> Selection:
    gate = q @ pooled(heads_of(k, q.shape[1]), size).transpose(-1, -2)
    own = torch.arange(q.shape[-2], device=q.device)[:, None] // size == torch.arange(gate.shape[-1], device=q.device)
    return Selection(choose(gate, own, mode, threshold, top_k, scope), 1, size)


def vmoba_program(q: Tensor, k: Tensor, v: Tensor, call: Call, *, grid: Grid | None, tile: Grid, **plan: object) -> Tensor:
    length, size = q.shape[-2], math.prod(tile)
    if k.shape[-2] != length or (grid is not None and math.prod(grid) != length):
        raise RegardError(f"{length} queries, {k.shape[-2]} keys: expected the tokens of grid={grid} in both")
    chosen = Chosen(bind(vmoba_plan, size=size, **plan), ahead=True)
    if grid is None:
        return call.attend(q, k, v, Weighted(select=chosen), scale=call.scale)
    order = tiles(grid, tile)
    return order.invert(call.attend(*(order.apply(x) for x in (q, k, v)), Weighted(select=chosen), scale=call.scale))
