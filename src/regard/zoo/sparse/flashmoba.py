"""FlashMoBA: MoBA with small blocks: why they route well, a key convolution, and a path that gathers queries block by block (id 292; Xiao et al., 2025).

SNR = Delta_eff sqrt(d / (2 B)), P(wrong) = Phi(-SNR), Delta_eff = Delta_mu + (m - 1)(mu_cluster - mu_noise);  k'_t = k_t + silu(sum_l w_l k_{t-l})
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra.blocks import heads_of
from regard.catalog.registry import register
from regard.errors import RegardError


def moba_snr(block_size: int, head_dim: int, gap: float, related: int = 1, cluster: float = 0.0, noise: float = 0.0) -> tuple[float, float]:
    """(signal-to-noise ratio of a block's score, probability that a block without the key beats it).

    gap: expected affinity of the key over the background; related: m keys of the same block that share it, of mean affinity `cluster` over `noise`.
    """
    effective = gap + (related - 1) * (cluster - noise)
    snr = effective * math.sqrt(head_dim / (2 * block_size))
    return snr, 0.5 * math.erfc(snr / math.sqrt(2))


@dataclass(frozen=True)
class Routing:
    """Measured: mean and deviation of the score gap, their ratio, and how often the wrong block wins."""

    mean: float
    deviation: float
    failure: float

    @property
    def snr(self) -> float:
        return self.mean / self.deviation


def routing_trial(block_size: int, head_dim: int, affinity: float, related: int = 1, trials: int = 20_000, seed: int = 0) -> Routing:
    """Unit Gaussian directions: a block with `related` keys of q.k = affinity against one without, `trials` times."""
    generator = torch.Generator().manual_seed(seed)
    gaps = []
    for _ in range(0, trials, 1000):
        q = F.normalize(torch.randn(1000, 1, head_dim, generator=generator), dim=-1)
        keys = F.normalize(torch.randn(1000, 2 * block_size, head_dim, generator=generator), dim=-1)
        side = F.normalize(keys[:, :related] - (keys[:, :related] * q).sum(-1, keepdim=True) * q, dim=-1)
        planted = affinity * q + math.sqrt(1 - affinity**2) * side
        s = (torch.cat((planted, keys[:, related:]), 1) * q).sum(-1).unflatten(-1, (2, block_size)).mean(-1)
        gaps.append(s[:, 0] - s[:, 1])
    gap = torch.cat(gaps)
    return Routing(float(gap.mean()), float(gap.std()), float((gap <= 0).double().mean()))


class KeyConv(nn.Module):
    """k_t + silu(sum_l w_l k_{t-l}), causal and a channel at a time; k (B, Hkv, L, D). Zero taps change nothing."""

    def __init__(self, kv_heads: int, head_dim: int, width: int = 3):
        super().__init__()
        if width < 1:
            raise RegardError(f"width={width}; expected at least 1")
        self.taps = nn.Parameter(torch.zeros(kv_heads, width, head_dim))

    def forward(self, k: Tensor) -> Tensor:
        width = self.taps.shape[1]
        past = F.pad(k, (0, 0, width - 1, 0))
        mixed = sum(
            (past[:, :, width - 1 - lag : width - 1 - lag + k.shape[2]] * self.taps[:, lag, None] for lag in range(width)),
            torch.zeros_like(k),
        )
        return k + F.silu(mixed)


def flash_top_k(q: Tensor, centroids: Tensor, count: int, block_size: int, tile: int = 64) -> Tensor:
    """Past complete blocks (B, H, L, count) of best q.centroid, -1 where there are fewer: running best of tiles of centroids, no L x n scores."""
    best = q.new_full((*q.shape[:3], count), float("-inf"))
    index = torch.full(best.shape, -1, dtype=torch.long, device=q.device)
    own = torch.arange(q.shape[2], device=q.device)[:, None] // block_size
    for start in range(0, centroids.shape[2], tile):
        numbers = torch.arange(start, min(start + tile, centroids.shape[2]), device=q.device)
        s = (q @ centroids[:, :, numbers].transpose(-1, -2)).masked_fill(numbers >= own, float("-inf"))
        both, where = torch.cat((best, s), -1), torch.cat((index, numbers.expand(s.shape)), -1)
        best, at = both.topk(count, -1)
        index = where.gather(-1, at)
    return index.masked_fill(best == float("-inf"), -1)


def column_lists(index: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """For one head, index (L, count): (offsets (blocks + 1,), rows): the queries of each key block, in order."""
    order = index.flatten().argsort(stable=True)
    chosen = index.flatten()[order]
    first = int((chosen < 0).sum())
    counts = torch.bincount(chosen[first:], minlength=blocks)
    return F.pad(counts.cumsum(0), (1, 0)), order[first:] // max(index.shape[1], 1)


@register("flashmoba", kind="module")
def flash_moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 128,
    top_k: int = 8,
    lengths: tuple[int, ...] | None = None,
    scale: float | None = None,
) -> Tensor:
    """MoBA by key block: q (B, H, L, D), k, v (B, Hkv, L, D) -> (B, H, L, Dv); the same result as mechanism "moba".

    Each key block's queries are gathered into one dense product; partial results meet through their log-sum-exps. lengths: packed sequences.
    """
    if block_size < 1 or top_k < 1 or (lengths is not None and sum(lengths) != k.shape[2]):
        raise RegardError(
            f"block_size={block_size}, top_k={top_k}, lengths={lengths}: expected at least 1, and lengths that sum to {k.shape[2]}"
        )
    k, v = heads_of(k, q.shape[1]), heads_of(v, q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = lengths or (k.shape[2],)
    split = (x.split(parts, 2) for x in (q, k, v))
    outs = [packed(q_, k_, v_, block_size, top_k, scale) for q_, k_, v_ in zip(*split, strict=True)]
    return torch.cat(outs, 2)


def packed(q: Tensor, k: Tensor, v: Tensor, size: int, top_k: int, scale: float) -> Tensor:
    """One sequence."""
    length, complete = k.shape[2], k.shape[2] // size
    tail = -length % size
    own_q, own_k, own_v = (F.pad(x, (0, 0, 0, tail)).unflatten(2, (-1, size)) for x in (q, k, v))
    s = (own_q @ own_k.transpose(-1, -2) * scale).masked_fill(
        ~torch.ones(size, size, dtype=torch.bool, device=q.device).tril(), float("-inf")
    )
    own_lse = s.logsumexp(-1, keepdim=True)
    pieces = [((torch.exp(s - own_lse) @ own_v).flatten(2, 3)[:, :, :length], own_lse.flatten(2, 3)[:, :, :length])]
    if top_k > 1 and complete:
        with torch.no_grad():
            centroids = k[:, :, : complete * size].unflatten(2, (complete, size)).mean(3)
            index = flash_top_k(q, centroids, min(top_k - 1, complete), size)
        heads = []
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                heads.append(by_columns(q[b, h], k[b, h], v[b, h], index[b, h], size, complete, scale))
        pieces.append(tuple(torch.stack(x).unflatten(0, q.shape[:2]) for x in zip(*heads, strict=True)))  # type: ignore[arg-type]
    top = torch.stack([lse.detach() for _, lse in pieces]).amax(0)
    weights = [torch.exp(lse - top) for _, lse in pieces]
    total = sum(weights, torch.zeros_like(top))
    return sum((o * w for (o, _), w in zip(pieces, weights, strict=True)), torch.zeros_like(pieces[0][0])) / total


def by_columns(q: Tensor, k: Tensor, v: Tensor, index: Tensor, size: int, blocks: int, scale: float) -> tuple[Tensor, Tensor]:
    """One head's past blocks, block by block: (out (L, Dv), log-sum-exp (L, 1)); -inf for queries with none."""
    offsets, rows = column_lists(index, blocks)
    partial, logs, edges = [], [], offsets.tolist()
    for block in range(blocks):
        mine = rows[edges[block] : edges[block + 1]]
        at = slice(block * size, (block + 1) * size)
        s = q[mine] @ k[at].T * scale
        lse = s.logsumexp(-1, keepdim=True)
        partial.append(torch.exp(s - lse) @ v[at])
        logs.append(lse)
    lse, o = torch.cat(logs), torch.cat(partial)
    top = torch.full((len(q), 1), float("-inf"), dtype=q.dtype, device=q.device).scatter_reduce(0, rows[:, None], lse.detach(), "amax")
    safe = torch.where(top.isfinite(), top, 0.0)
    w = torch.exp(lse - safe[rows])
    mass = torch.zeros_like(safe).index_add(0, rows, w)
    out = torch.zeros(len(q), v.shape[1], dtype=q.dtype, device=q.device).index_add(0, rows, w * o)
    some = mass > 0
    return out / torch.where(some, mass, 1.0), torch.where(some, torch.where(some, mass, 1.0).log() + safe, float("-inf"))
