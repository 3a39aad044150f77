"""FlexPrefill: each head takes the pattern its last queries call for, and as many blocks as reach a share of mass (id 224; Lai et al., 2025).

A = softmax(q_last k^T), the last block of queries; d = sqrt(JSD(pooled estimate, block sums of A))
d < tau: blocks of the pooled map until their mass is gamma n;  else: the columns and diagonals that hold gamma of A's mass
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, Selection, Sizes, View, Weighted, bind
from regard.algebra.blocks import block_sums, heads_of, pooled, probabilities, top_k, top_p
from regard.algebra.probes import last_mass
from regard.algebra.select import scoring
from regard.catalog.registry import register


@register("flexprefill")
def flexprefill(
    gamma: float = 0.9, tau: float = 0.1, min_budget: int | None = 512, max_budget: int | None = None, block_size: int = 128,
    count_size: int = 128,
) -> Weighted:  # fmt: skip
    """gamma: mass to keep (from 1 on: everything). tau: distance under which a head is query-aware. min_budget, max_budget: tokens a query
    block may read of columns, and of diagonals (min_budget None: one block). count_size: keys that are counted as one block when they are
    turned into blocks to read; released code counts 128 whatever the block. Prompts of at most max(2 block_size, min_budget) tokens, and chunks after others, run dense."""
    constants = {
        "gamma": gamma,
        "tau": tau,
        "min_budget": min_budget,
        "max_budget": max_budget,
        "block_size": block_size,
        "count_size": count_size,
    }
    return Weighted(
        mask=Causal(),
        select=Chosen(bind(flex_plan, **constants), ahead=True, decode=False, cost=bind(flex_cost, size=block_size), by_sequence=True),
    )


def flex_cost(sizes: Sizes, *, size: int) -> int:
    """The last block of queries against all keys, and blocks against blocks."""
    return scoring(sizes, min(size, sizes.q_len), sizes.k_len) + scoring(sizes, sizes.q_len / size, sizes.k_len / size)


def distance(q: Tensor, pooled_k: Tensor, mass: Tensor, size: int) -> Tensor:
    """sqrt of the Jensen-Shannon divergence (natural log) between the pooled estimate and the true block mass of the last queries."""
    estimate = (q[..., -size:, :].mean(-2, keepdim=True) @ pooled_k.transpose(-1, -2)).softmax(-1).squeeze(-2)
    truth = block_sums(mass, size)
    middle = (estimate + truth) / 2
    parts = [torch.where(x > 0, x * (x / middle.clamp_min(1e-30)).log(), 0.0).sum(-1) for x in (estimate, truth)]
    return (sum(parts, torch.zeros_like(parts[0])) / 2).clamp_min(0).sqrt()


def distance_sums(mass: Tensor, size: int) -> Tensor:
    """The mass (..., L) of each distance in blocks of them, cut from the far end: of a ragged length the diagonal's block is the short one."""
    return block_sums(mass.flip(-1), size).flip(-1)


def patterns(q: Tensor, k: Tensor, *, tau: float = 0.1, block_size: int = 128, scale: float | None = None) -> list[list[str]]:
    """The pattern of each head of each prompt, "query-aware" or "vertical-slash": q (B, H, L, D), k (B, Hkv, L, D)."""
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    means = heads_of(pooled(k, block_size), q.shape[1])
    aware = distance(q, means, last_mass(q, k, block_size)[0], block_size) < tau
    return [["query-aware" if one else "vertical-slash" for one in row] for row in aware.tolist()]


def flex_plan(
    q: Tensor, k: Tensor, view: View, *, gamma: float, tau: float, min_budget: int | None, max_budget: int | None, block_size: int,
    count_size: int,
) -> Selection | None:  # fmt: skip
    """Which key blocks each block of queries reads (q times scale)."""
    size, length = block_size, k.shape[-2]
    if gamma >= 1 or q.shape[-2] != length or length <= max(2 * size, min_budget or 0):
        return None
    means = heads_of(pooled(k, size), q.shape[1])
    masses = last_mass(q, k, size, diagonals=True)
    aware = distance(q, means, masses[0], size) < tau
    count = -(-length // size)
    floor, ceiling = max(1, -(-(min_budget or 0) // size)), count if max_budget is None else max(1, -(-max_budget // size))
    chosen = []
    for mass in masses:
        needed = (mass.sort(-1, descending=True).values.cumsum(-1) <= gamma).sum(-1, keepdim=True) + 1
        budget = torch.where(aware[..., None], floor, (needed // count_size + 1).clamp(floor, max(floor, ceiling)))
        blocks = block_sums(mass, size) if mass is masses[0] else distance_sums(mass, size)
        blocks[..., 0] = float("inf")  # the first key block, and the diagonal
        chosen.append(top_k(blocks, torch.ones_like(blocks, dtype=torch.bool), budget))
    columns, slashes = chosen
    u, w = torch.arange(count, device=q.device)[:, None], torch.arange(count, device=q.device)
    causal = w <= u
    keep = causal & (columns[..., None, :] | slashes[..., (u - w).clamp(min=0)])
    if not bool(aware.any()):
        return Selection(keep, size, size)
    pool = probabilities(pooled(q, size) @ means.transpose(-1, -2), causal)
    flat = top_p(pool.flatten(-2), gamma * count, reach=False).unflatten(-1, (count, count))
    return Selection(keep | (flat & aware[..., None, None] & causal), size, size)
