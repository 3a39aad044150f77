"""VMoBA: MoBA for video, over blocks of frames, of tiles and of cubes in turn (id 266; Wu et al., 2025).

layer l cuts the grid by partition l mod 3; g[w, t] = mean(K_w).q_t;  within a scope, g' = (g - min) / (max - min)
the own block, and the fewest others by falling g' whose share of sum g' lifts the kept share to the threshold
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Chosen, Program, Selection, View, Weighted, bind
from regard.algebra.blocks import heads_of, pooled
from regard.algebra.permute import tiles
from regard.catalog.registry import register
from regard.engine.composed import Call
from regard.errors import RegardError

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
    unreached: int | None = None,
    fallback: bool = False,
) -> Program:
    """grid: frames, height, width (None: a line cut in blocks of prod(tile)). tile: frames, height, width of a block; layer l keeps all of it
    (l mod 3 = 2), only its frames (0) or only height and width (1). mode: "threshold" (at least one pair beside the own ones a scope), or
    "topk": top_k pairs a query over the scope, own ones counted. scope: pairs of one sequence that are ranked together: a query's, a head's,
    all, or a block's of all heads. unreached: other pairs kept where the threshold is 1 or more (None: all; released code keeps 2 in the scopes
    "query_head" and "block"). fallback: full attention where a whole call chooses own blocks alone, as released."""
    if mode not in ("threshold", "topk") or scope not in SCOPES:
        raise RegardError(f"mode={mode!r}, scope={scope!r}; expected threshold or topk, and one of {', '.join(SCOPES)}")
    size = partition(grid, tile, layer)
    constants = {"grid": grid, "tile": size, "mode": mode, "threshold": threshold, "top_k": top_k, "scope": scope}
    constants |= {"unreached": unreached, "fallback": fallback}
    return Program(bind(vmoba_program, **constants))


def partition(grid: Grid | None, tile: Grid, layer: int) -> Grid:
    """The tile of a layer: 1-D (whole frames), 2-D (spatial tiles over all frames) or 3-D."""
    if grid is None:
        return (math.prod(tile),)
    return ((tile[0], *grid[1:]), (grid[0], *tile[1:]), tile)[layer % 3]


def grouped(x: Tensor, scope: str) -> Tensor:
    """(B, H, L, n) -> (..., pairs of one scope)."""
    return {"query_head": x, "head_global": x.flatten(2), "overall": x.flatten(1), "block": x.permute(0, 3, 1, 2).flatten(2)}[scope]


def ungrouped(x: Tensor, like: Tensor, scope: str) -> Tensor:
    return x.unflatten(2, like.shape[1:3]).permute(0, 2, 3, 1) if scope == "block" else x.reshape(like.shape)


def choose(gate: Tensor, own: Tensor, mode: str, threshold: float, top_k: int, scope: str, unreached: int | None = None) -> Tensor:
    """(B, H, L, n) bool: own blocks and what the mode adds."""
    g, mine = grouped(gate, scope), grouped(own.expand(gate.shape), scope)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    share = (g - low) / (high - low).clamp_min(1e-30)
    share = share / share.sum(-1, keepdim=True).clamp_min(1e-30)
    need = (threshold - (share * mine).sum(-1, keepdim=True)).clamp_min(0)
    ordered, ranked = share.masked_fill(mine, -1.0).sort(dim=-1, descending=True, stable=True)
    others, rank = ordered >= 0, torch.arange(g.shape[-1], device=g.device)
    if mode == "topk":
        pairs = top_k * g.shape[-1] / gate.shape[-1]  # of so many queries, each with a pair a block
        chosen = rank < max(1, round(pairs)) - mine.sum(-1, keepdim=True)
    elif threshold < 1:
        chosen = (ordered.cumsum(-1) - ordered < need) | (rank == 0)
    else:
        chosen = torch.ones_like(others) if unreached is None else rank < unreached
    chosen = chosen & others
    return ungrouped(torch.zeros_like(chosen).scatter_(-1, ranked, chosen) | mine, gate, scope)


def vmoba_plan(
    q: Tensor, k: Tensor, view: View, *, size: int, mode: str, threshold: float, top_k: int, scope: str, unreached: int | None = None,
    fallback: bool = False,
) -> Selection | None:  # fmt: skip
    gate = q @ pooled(heads_of(k, q.shape[1]), size).transpose(-1, -2)
    own = torch.arange(q.shape[-2], device=q.device)[:, None] // size == torch.arange(gate.shape[-1], device=q.device)
    keep = choose(gate, own, mode, threshold, top_k, scope, unreached)
    return None if fallback and not bool((keep & ~own).any()) else Selection(keep, 1, size)


def vmoba_program(q: Tensor, k: Tensor, v: Tensor, call: Call, *, grid: Grid | None, tile: Grid, **plan: object) -> Tensor:
    length, size = q.shape[-2], math.prod(tile)
    if k.shape[-2] != length or (grid is not None and math.prod(grid) != length):
        raise RegardError(f"{length} queries, {k.shape[-2]} keys: expected the tokens of grid={grid} in both")
    chosen = Chosen(bind(vmoba_plan, size=size, **plan), ahead=True)
    if grid is None:
        return call.attend(q, k, v, Weighted(select=chosen), scale=call.scale)
    order = tiles(grid, tile)
    return order.invert(call.attend(*(order.apply(x) for x in (q, k, v)), Weighted(select=chosen), scale=call.scale))
