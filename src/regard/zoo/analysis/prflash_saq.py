"""PrFlashAttention, staircase quantisation and what comes with them (id 188; Li, 2024): block pairs kept by lot, the nearer the likelier.

block pair (a, b) at distance d = a - b >= 0 is kept with probability p(d), p(0) = 1: harmonic min(1, c / (d + 1)), or geometric c^d;
softmax over the keys of kept blocks alone; unbiased: exp(s_ij) / p(d), so that the sums over keys are right in the mean over lots
The paper's other four parts stand where they are used: `regard.algebra.Harmonic` (ALiBi of a harmonic series over rotary positions: `position`
here), `regard.cache.Staircase` (SAQ), `regard.tasks.subwords` (likeliest sub-words), `regard.search.cross_entropy`. Its text gives few numbers:
defaults are this library's. Blocks are not packed into a denser shape; executors skip what is not kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.algebra import Causal, Chain, Chosen, Harmonic, Input, Modified, Position, Rope, Selection, View, Weighted, bind
from regard.algebra.lots import uniform
from regard.catalog.registry import register
from regard.errors import RegardError

LAWS = ("harmonic", "geometric")


@register("prflash-saq")
def prflash(
    block_size: int = 64,
    law: str = "harmonic",
    c: float = 1.0,
    seed: int = 0,
    per_head: bool = True,
    unbiased: bool = False,
    position: str | None = None,
) -> Weighted:
    """law, c: p(d), with c > 0 and for the geometric law c <= 1 (1: everything). seed: of the lots, which depend on head and block alone; another
    one for another layer (for every step anew: `draws`). per_head: heads draw by themselves. position: None, or "additive" or "multiplicative", see
    `rope_alibi_harmonic`. Input, optional: `draws` (H, blocks, blocks) in [0, 1): kept where they are below p."""
    if block_size < 1 or law not in LAWS or not (c > 0 and math.isfinite(c)) or (law == "geometric" and c > 1):
        raise RegardError(
            f"block_size={block_size}, law={law!r}, c={c}: expected at least 1, one of {', '.join(LAWS)}, and c > 0 (c <= 1 if geometric)"
        )
    select = Chosen(bind(drawn, block=block_size, law=law, c=c, seed=seed, per_head=per_head), by_sequence=True)
    found: list[Position] = [] if position is None else list(rope_alibi_harmonic(position).positions)
    if unbiased:
        found.append(Modified(bind(corrected, block=block_size, law=law, c=c)))
    inputs = (Input("draws", "hff", default="pool"),)
    return Weighted(mask=Causal(), position=Chain(tuple(found)) if found else None, select=select, inputs=inputs)


def rope_alibi_harmonic(way: str = "additive", base: float = 10000.0) -> Chain:
    """Rotary positions and, on the turned scores, a harmonic penalty of the distance: s_ij - m_h H_{i-j}, or s_ij / (1 + i - j)."""
    return Chain((Rope(base), Harmonic(way)))


def log_chance(distance: Any, law: str, c: float) -> Any:
    """log p of block distances >= 0, elementwise."""
    if law == "geometric":
        return distance * math.log(c)
    return torch.where(distance > 0, (math.log(c) - torch.log1p(distance)).clamp(max=0.0), 0.0)


def corrected(s: Tensor, i: Tensor, j: Tensor, block: int, law: str, c: float) -> Tensor:
    return s - log_chance((i // block - j // block).clamp(min=0).type_as(s), law, c)


def drawn(q: Tensor, k: Tensor, view: View, block: int, law: str, c: float, seed: int, per_head: bool) -> Selection:
    """The lots of a call; queries that begin inside a block have rows of their own, so that blocks stay where they are."""
    device, first, heads = q.device, view.first, q.shape[1]
    size = block if first % block == 0 else 1
    rows = torch.arange(first, first + q.shape[2], size, device=device) // block
    columns = torch.arange(-(-k.shape[2] // block), device=device)
    distance = rows[:, None] - columns
    draws = view.inputs.get("draws")
    if draws is None:
        head = torch.arange(heads if per_head else 1, device=device)[:, None, None]
        lots = uniform(seed, head, rows[:, None], columns)
    else:
        if draws.dim() != 3 or draws.shape[0] not in (1, heads) or min(draws.shape[1:]) < len(columns):
            raise RegardError(f"input 'draws' is {tuple(draws.shape)}; expected ({heads}, {len(columns)}, {len(columns)}), or more blocks")
        lots = draws.to(device)[:, rows.clamp_min(0)][:, :, columns].double()
    p = log_chance(distance.clamp_min(0).double(), law, c).exp()
    keep = (lots < p) & (distance >= 0) | (distance == 0)
    return Selection(keep[None].expand(1, heads, -1, -1), size, block)


def expected_density(blocks: int, law: str = "harmonic", c: float = 1.0) -> float:
    """Share of the lower triangle of block pairs that is kept in the mean: sum_d (n - d) p(d) / (n (n + 1) / 2)."""
    distance = torch.arange(blocks, dtype=torch.float64)
    return float(((blocks - distance) * log_chance(distance, law, c).exp()).sum() / (blocks * (blocks + 1) / 2))
