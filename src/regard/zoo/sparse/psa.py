"""PSA: blocks read at full, half, quarter or eighth resolution, or not at all (id 264; Li et al., 2025).

level p in {1, 2, 4, 8} of a (query block, key block) pair: the keys are means of p tokens, weigh exp(s + log p); 0: skipped
Orders of tokens before blocks are cut: p = `regard.algebra.curve.gilbert(shape)`, `regard.algebra.permute.tiles(...)` or, of the keys' own order,
`regard.algebra.clusters.by_cluster(k, count)`; then p.invert(attend(p.apply(q), p.apply(k), p.apply(v), "psa")).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, Full, Input, Program, Selection, Since, View, Weighted, bind
from regard.algebra.blocks import cut, heads_of, lengths
from regard.catalog.registry import register
from regard.engine.composed import Call
from regard.errors import RegardError

RANKS = ((1, 0.05), (2, 0.15), (4, 0.25), (8, 0.5))
MASSES = ((1, 0.4), (2, 0.5), (4, 0.6), (8, 0.8))


@register("psa")
def psa(
    mode: str = "topk",
    ranges: tuple[tuple[int, float], ...] | None = None,
    block_size: int = 128,
    sample: int = 32,
    similarity: tuple[float, float, float] | None = None,
    text: int = 0,
    causal: bool = False,
    seed: int = 0,
    tile: int = 32,
    floor: float = 0.06,
    tail: str = "counted",
) -> Program:
    """mode: "topk": ranges give each level the rank share up to which it holds; "threshold": the cumulative score mass. ranges None: the
    paper's. sample: tokens a block that importance is measured on. similarity: cosines that levels 2, 4, 8 need (None: no cap; the paper's
    are 0.7, 0.65, 0.6). text: tokens at the end read in full. tile: pooled tokens that are worked on together: a level's blocks come in
    multiples that fill a tile of level 1, as released (1: any number). floor: the least share of level 1 in threshold mode. tail: pooled
    tokens over the end count the tokens they have ("counted"), or are filled up with copies of the last one ("repeated", as released).
    causal: a pooled token is read from its last member on. Input `levels` (B, H, nq, nk), optional: a level map instead of the plan's."""
    if mode not in ("topk", "threshold") or tail not in ("counted", "repeated"):
        raise RegardError(f"mode={mode!r}, tail={tail!r}; expected topk or threshold, and counted or repeated")
    if tile < 1:
        raise RegardError(f"tile={tile}; expected at least 1")
    if similarity is not None and len(similarity) != 3:
        raise RegardError(f"similarity={similarity}; expected three cosines, of levels 2, 4 and 8")
    found = ranges or (RANKS if mode == "topk" else MASSES)
    constants = {
        "mode": mode,
        "ranges": found,
        "block_size": block_size,
        "sample": sample,
        "similarity": similarity,
        "text": text,
        "seed": seed,
        "tile": tile,
        "floor": floor,
        "tail": tail,
    }
    levels = Input("levels", "bhff", default="pool", dtype="int")
    return Program(bind(pyramid, **constants), under="causal" if causal else "none", inputs=(levels,))


def importance(q: Tensor, k: Tensor, block_size: int, sample: int, seed: int) -> Tensor:
    """(B, H, nq, nk): max over sampled rows and columns of exp(s - row maximum)."""
    offsets = (
        torch.randperm(block_size, generator=torch.Generator().manual_seed(seed))[: min(sample, block_size)].sort().values.to(q.device)
    )
    places = [(torch.arange(0, x.shape[-2], block_size, device=q.device)[:, None] + offsets).clamp(max=x.shape[-2] - 1) for x in (q, k)]
    s = q[..., places[0].flatten(), :] @ k[..., places[1].flatten(), :].transpose(-1, -2)
    s = torch.exp(s - s.amax(-1, keepdim=True))
    width = len(offsets)
    return s.unflatten(-1, (-1, width)).amax(-1).unflatten(-2, (-1, width)).amax(-2)


def levels_of(scores: Tensor, mode: str, ranges: tuple[tuple[int, float], ...], per_tile: int = 8, floor: float = 0.06) -> Tensor:
    """A level for each pair from its row's scores: by rank, or by cumulative mass (the crossing entry still counts).

    per_tile: blocks of level 1 that a tile is of; a level's ranks are rounded up to whole tiles, and down at the end of a row.
    """
    count = scores.shape[-1]
    ordered, ranked = scores.sort(dim=-1, descending=True, stable=True)
    total = ordered.cumsum(-1)
    share = total / total[..., -1:].clamp_min(1e-30)
    rank, level = torch.arange(count, device=scores.device), torch.zeros_like(ranked)
    start = torch.zeros_like(ranked[..., :1])
    for value, end in ranges:
        if mode == "topk":
            stop = torch.full_like(start, min(count, int(count * end)))
        else:
            within = (share <= end + 1e-6).sum(-1, keepdim=True)
            stop = torch.where(within > 0, (within + 1).clamp(max=count), start)
        step = math.ceil(value / per_tile)
        wide = (start + (stop - start).clamp(min=0).add(step - 1).div(step, rounding_mode="floor") * step).clamp(max=count)
        whole = start + (wide - start).div(step, rounding_mode="floor") * step
        stop = torch.where(wide == count, whole, wide)
        if mode == "threshold" and value == 1:
            stop = stop.clamp(min=min(count, int(count * floor) + 1))
        level[(rank >= start) & (rank < stop)] = value
        start = torch.maximum(start, stop)
    return torch.zeros_like(level).scatter_(-1, ranked, level)


def similarity_cap(k: Tensor, block_size: int, thresholds: tuple[float, float, float]) -> Tensor:
    """(B, H, nk): the largest pooling factor that the likeness of a block's neighbouring keys allows."""
    blocks = torch.nn.functional.normalize(cut(k, block_size), dim=-1)
    cap = torch.ones(blocks.shape[:-2], dtype=torch.long, device=k.device)
    for factor, bound in zip((2, 4, 8), thresholds, strict=True):
        groups = blocks.unflatten(-2, (-1, factor))
        cap = torch.where((groups[..., 0, :] * groups[..., -1, :]).sum(-1).mean(-1) > bound, factor, cap)
    return cap


def psa_plan(
    q: Tensor,
    k: Tensor,
    *,
    mode: str,
    ranges: tuple[tuple[int, float], ...],
    block_size: int,
    sample: int,
    similarity: tuple[float, float, float] | None,
    text: int,
    seed: int,
    tile: int,
    floor: float,
    causal: bool = False,
) -> Tensor:
    """Levels (B, H, nq, nk) in {0, 1, 2, 4, 8} for q times scale."""
    scores = importance(q, k, block_size, sample, seed)
    u, w = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
    if causal:
        scores = scores.masked_fill(w > u[:, None], 0.0)
    level = levels_of(scores, mode, ranges, max(1, block_size // tile), floor)
    if similarity is not None:
        cap = similarity_cap(k, block_size, similarity)[..., None, :]
        level = torch.where(level == 0, 0, torch.minimum(level, cap))
    level = torch.where(scores == scores.amax(-1, keepdim=True), 1, level)  # the best block is always read
    if text:
        level = torch.where(w >= (k.shape[-2] - text) // block_size, 1, level)
    return torch.where(w == u[:, None], 1, level * (w <= u[:, None])) if causal else level


def of_level(q: Tensor, k: Tensor, view: View, levels: Tensor, *, level: int, block_q: int, block_k: int) -> Selection:
    return Selection((levels == level).expand(q.shape[0], q.shape[1], -1, -1), block_q, block_k)


def weigh(s: Tensor, amount: Tensor) -> Tensor:
    return s + amount


def pyramid(
    q: Tensor, k: Tensor, v: Tensor, call: Call, levels: Tensor | None, *, block_size: int, text: int, tail: str, **plan: object
) -> Tensor:
    k, v = heads_of(k, q.shape[1]), heads_of(v, q.shape[1])
    causal = isinstance(call.mask, Causal)
    if causal and q.shape[-2] != k.shape[-2]:
        raise RegardError(f"{q.shape[-2]} queries and {k.shape[-2]} keys: causal PSA reads a whole prompt")
    if levels is None:
        with torch.no_grad():
            levels = psa_plan(q * call.logit_scale(q), k, block_size=block_size, text=text, causal=causal, **plan)  # type: ignore[arg-type]
    parts = []
    for level in sorted(set(levels.unique().tolist()) - {0}):
        if level < 0 or block_size % level:
            raise RegardError(f"level {level} does not divide block_size={block_size}")
        short = -k.shape[-2] % block_size if tail == "repeated" and level > 1 else 0
        k_level, v_level = (torch.cat((x, x[..., -1:, :].expand(*x.shape[:-2], short, -1)), -2) if short else x for x in (k, v))
        count = lengths(k_level.shape[-2], level, q.device)
        pooled = [cut(x, level).sum(-2) / count[:, None].to(q.dtype) for x in (k_level, v_level)]
        select = Chosen(bind(of_level, level=level, block_q=block_size, block_k=block_size // level), ahead=True)
        inner = Weighted(
            position=weigh,
            select=select,
            mask=Since() if causal else Full(),
            inputs=(Input("amount", "k"), Input("levels", "bhff", dtype="int")),
        )
        given: dict[str, Tensor] = {"amount": count.to(q.dtype).log(), "levels": levels}
        if causal:  # queries stand at the end of the pooled keys: positions are behind by what pooling has left out
            last = (count.cumsum(0) - 1).clamp(max=k.shape[-2] - 1) if tail == "repeated" else count.cumsum(0) - 1
            given["since"] = (last + len(count) - q.shape[-2])[None, None].expand(q.shape[0], q.shape[1], -1)
        parts.append(call.with_stats(q, *pooled, inner, scale=call.scale, **given))
    return call.merge(parts) if parts else torch.zeros_like(q[..., :1]).expand(*q.shape[:-1], v.shape[-1])
