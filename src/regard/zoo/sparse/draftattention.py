"""DraftAttention: which patches of video attend to which, decided on an average-pooled draft (id 289; Shen et al., 2025).

draft = softmax(pool(q) pool(k)^T / sqrt(D)) over p_h x p_w patches a frame; a head keeps the largest share of the whole map
tokens are re-listed patch by patch, so that kept entries are blocks; exact softmax inside them; text reads and is read by all
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.algebra import Chosen, Mechanism, Program, Selection, View, Weighted, bind
from regard.algebra.blocks import heads_of, pooled
from regard.algebra.permute import tiles
from regard.catalog.registry import register
from regard.engine.composed import Call
from regard.errors import RegardError


@register("draftattention")
def draft(
    grid: tuple[int, int, int] | None = None, pool: tuple[int, int] = (8, 16), sparsity: float = 0.75, every_row: bool = True, text: int = 0
) -> Program:
    """grid: frames, height, width of the visual tokens, frame-major (None: one frame of one row, patches of pool[0] * pool[1] tokens).
    sparsity: share of the map left out (0: dense; 1: all but a head's best entry). every_row: each patch keeps at least its best. text: tokens after the grid."""
    if not 0 <= sparsity <= 1:
        raise RegardError(f"sparsity={sparsity}; expected a share from 0 to 1")
    return Program(bind(drafted, grid=grid, pool=pool, sparsity=sparsity, every_row=every_row, text=text))


def draft_map(q: Tensor, k: Tensor, size: int) -> Tensor:
    """softmax over pooled patches, (B, H, nq, nk), for reordered q (times scale) and k without text."""
    return (pooled(q, size) @ pooled(k, size).transpose(-1, -2)).softmax(-1)


def draft_plan(q: Tensor, k: Tensor, view: View, *, size: int, visual: int, sparsity: float, every_row: bool) -> Selection:
    """The largest (1 - sparsity) of a head's whole map; every block with text tokens."""
    chart = draft_map(q[..., :visual, :], heads_of(k, q.shape[1])[..., :visual, :], size)
    flat = chart.flatten(-2)
    dropped = min(math.floor(sparsity * flat.shape[-1]), flat.shape[-1] - 1)
    keep = chart >= flat.sort(-1).values[..., dropped][..., None, None]
    if every_row:
        keep = keep | (chart == chart.amax(-1, keepdim=True))
    extra = -(-q.shape[-2] // size) - keep.shape[-1]
    return Selection(torch.nn.functional.pad(keep, (0, extra, 0, extra), value=True), size, size)


def drafted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    grid: tuple[int, int, int] | None,
    pool: tuple[int, int],
    sparsity: float,
    every_row: bool,
    text: int,
) -> Tensor:
    length, size = q.shape[-2], math.prod(pool)
    visual = length - text if grid is None else math.prod(grid)
    if k.shape[-2] != length or visual + text != length:
        raise RegardError(f"{length} queries, {k.shape[-2]} keys: expected grid={grid} tokens and text={text} of both")
    order = tiles((visual // size * size,), (size,), length - visual // size * size) if grid is None else tiles(grid, (1, *pool), text)
    visual = visual // size * size
    if not visual:
        return call.attend(q, k, v, Weighted(), scale=call.scale)
    plan = Chosen(bind(draft_plan, size=size, visual=visual, sparsity=sparsity, every_row=every_row), ahead=True)
    return order.invert(call.attend(*(order.apply(x) for x in (q, k, v)), Weighted(select=plan), scale=call.scale))


def schedule(step: int, layer: int, *, dense_steps: int = 10, dense_layers: int = 0, **settings: Any) -> Mechanism:
    """What layer `layer` runs at denoising step `step`, both from 0: dense attention in the first `dense_steps` steps and `dense_layers` layers,
    `draft(**settings)` after them."""
    if min(step, layer, dense_steps, dense_layers) < 0:
        raise RegardError(f"step={step}, layer={layer}, dense_steps={dense_steps}, dense_layers={dense_layers}; expected 0 or more")
    return Weighted() if step < dense_steps or layer < dense_layers else draft(**settings)
