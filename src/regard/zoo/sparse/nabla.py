"""NABLA: blocks of 8 x 8 patches kept up to a share of pooled mass, joined with sliding tiles (id 290; Mikhailov et al., 2025).

P = softmax(mean(Q_u).mean(K_w) / sqrt(D)) within a video; a row drops its smallest entries whose sum stays under 1 - thr
tiles: |dT| <= w_T // 2 and so on, on block coordinates, are kept as well
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Chosen, Input, Program, Selection, View, Weighted, bind
from regard.algebra.blocks import heads_of, pooled, probabilities
from regard.algebra.permute import tiles
from regard.catalog.registry import register
from regard.engine.composed import Call
from regard.errors import RegardError


@register("nabla")
def nabla(
    grid: tuple[int, int, int] | None = None,
    patch: int = 8,
    thr: float = 0.7,
    tile_window: tuple[int, int, int] | None = None,
    text: int = 0,
) -> Program:
    """grid: frames, height, width, frame-major, `patch` dividing the last two (None: blocks of patch^2 tokens in a line). thr: pooled mass a
    row keeps (1: dense). tile_window: blocks an axis of the sliding tile, or None. text: tokens after the grid, read by all and reading all.
    Input `docs` (B, L), optional: videos packed in one sequence, whole patches each."""
    if tile_window is not None and (len(tile_window) != 3 or min(tile_window) < 1):
        raise RegardError(f"tile_window={tile_window}; expected three positive numbers of blocks: frames, height, width")
    docs = Input("docs", "bf", default="pool", dtype="int")
    return Program(bind(nabla_program, grid=grid, patch=patch, thr=thr, tile_window=tile_window, text=text), inputs=(docs,))


def kept_blocks(p: Tensor, thr: float) -> Tensor:
    """Entries whose ascending cumulative sum reaches 1 - thr: what is dropped stays below it."""
    ordered, ranked = p.sort(dim=-1, stable=True)
    keep = (ordered.cumsum(-1) >= 1 - thr) if thr < 1 else torch.ones_like(ordered, dtype=torch.bool)
    return torch.zeros_like(keep).scatter_(-1, ranked, keep)


def tile_neighbours(shape: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """(n, n) bool: blocks of a grid of blocks within window // 2 of each other on every axis."""
    axes = torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")
    near = torch.ones(math.prod(shape), math.prod(shape), dtype=torch.bool)
    for at, width in zip(axes, window, strict=True):
        near &= (at.flatten()[:, None] - at.flatten()).abs() <= width // 2
    return near


def nabla_plan(
    q: Tensor,
    k: Tensor,
    view: View,
    docs: Tensor | None,
    *,
    size: int,
    visual: int,
    thr: float,
    near: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> Selection:
    """Which blocks each block reads, in patch order."""
    scores = pooled(q[..., :visual, :], size) @ pooled(heads_of(k, q.shape[1])[..., :visual, :], size).transpose(-1, -2)
    same = torch.ones(1, 1, *scores.shape[-2:], dtype=torch.bool, device=q.device)
    if docs is not None:
        ids = docs[:, :visual:size]
        same = (ids[:, :, None] == ids[:, None])[:, None]
    keep = kept_blocks(probabilities(scores, same), thr)
    if near is not None:
        keep = keep | tile_neighbours(*near).to(q.device)
    extra = -(-q.shape[-2] // size) - keep.shape[-1]
    return Selection(torch.nn.functional.pad(keep & same, (0, extra, 0, extra), value=True), size, size)


def nabla_program(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    docs: Tensor | None,
    *,
    grid: tuple[int, int, int] | None,
    patch: int,
    thr: float,
    tile_window: tuple[int, int, int] | None,
    text: int,
) -> Tensor:
    length, size = q.shape[-2], patch * patch
    if k.shape[-2] != length or (grid is not None and math.prod(grid) + text != length):
        raise RegardError(f"{length} queries, {k.shape[-2]} keys: expected grid={grid} tokens and text={text} of both")
    visual = (length - text) // size * size
    if not visual:
        return call.attend(q, k, v, Weighted(), scale=call.scale)
    order = tiles((visual,), (size,), length - visual) if grid is None else tiles(grid, (1, patch, patch), text)
    blocks = (visual // size,) if grid is None else (grid[0], grid[1] // patch, grid[2] // patch)
    near = None if tile_window is None else (blocks, tile_window[-len(blocks) :])
    sorted_docs = None if docs is None else docs.index_select(-1, order.order.to(docs.device))
    plan = Chosen(bind(with_docs, size=size, visual=visual, thr=thr, near=near), ahead=True)
    given = {} if sorted_docs is None else {"docs": sorted_docs}
    inner = Weighted(select=plan, inputs=(Input("docs", "bf", default="pool", dtype="int"),))
    return order.invert(call.attend(*(order.apply(x) for x in (q, k, v)), inner, scale=call.scale, **given))


def with_docs(
    q: Tensor, k: Tensor, view: View, *, size: int, visual: int, thr: float, near: tuple[tuple[int, ...], tuple[int, ...]] | None
) -> Selection:
    return nabla_plan(q, k, view, view.inputs.get("docs"), size=size, visual=visual, thr=thr, near=near)
