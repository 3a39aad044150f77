"""DHSA: chunks with borders where the text changes, scored by length-normalised means, tokens chosen by their chunk (id 30; 2025).

k_c = sum of a chunk's keys / sqrt(n_c), q_u likewise;  S = q_u k_c;  a query block reads its last `local` tokens and the best by S
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Chosen, Input, Selection, Sizes, View, Weighted, Window, bind
from regard.algebra.blocks import cut, lengths
from regard.algebra.select import scoring
from regard.catalog.registry import register
from regard.errors import RegardError

FALLBACKS = ("cosine", "fixed")
POOLS = ("norm", "mean", "max")


@register("dhsa")
def dhsa(
    budget: int = 1024, block_size: int = 32, local: int = 64, first: int = 0, dense_last: int = 0, chunk: int = 16,
    boundaries: str = "cosine", decode: bool = True, pool: str = "norm", window: int | None = None,
) -> Weighted:  # fmt: skip
    """budget: tokens a block of `block_size` queries reads, its last `local` among them. first: the first tokens, read in place of as many
    chosen ones of lowest position, as released. dense_last: queries at the end (an instruction) that read everything. pool: of a block's queries
    and a chunk's keys: "norm" (sum / sqrt(n)), "mean", or "max" of queries and mean of keys. window: keys before its own that a query may read.
    Input `starts` (B, Lk), optional: 1 where a chunk starts (`choose_boundaries`); without it chunks start where neighbouring keys differ
    most ("cosine", one in `chunk` on average) or every `chunk` tokens ("fixed"). decode: single queries choose too."""
    if boundaries not in FALLBACKS or pool not in POOLS or min(budget, block_size, chunk) < 1 or local < 1 or min(first, dense_last) < 0:
        raise RegardError(
            f"boundaries={boundaries!r}, pool={pool!r}, budget={budget}, block_size={block_size}, chunk={chunk}, local={local}, first={first}, "
            f"dense_last={dense_last}: expected one of {', '.join(FALLBACKS)}, of {', '.join(POOLS)}, and positive numbers (the last two from 0)"
        )
    budget = budget if window is None else min(budget, window)
    constants = {"budget": budget, "block_size": block_size, "local": local, "first": first, "dense_last": dense_last, "chunk": chunk}
    plan = Chosen(
        bind(token_plan, **constants, boundaries=boundaries, pool=pool, window=window),
        ahead=True,
        decode=decode,
        cost=bind(chunk_cost, chunk=chunk),
        by_sequence=True,
    )
    mask = Causal() if window is None else Causal() & Window(window + 1)
    return Weighted(mask=mask, select=plan, inputs=(Input("starts", "bk", 0.0),))


def chunk_cost(sizes: Sizes, *, chunk: int) -> int:
    """Chunks against chunks, heads averaged."""
    return scoring(sizes, sizes.q_len / chunk, sizes.k_len / chunk) // sizes.heads


def chunk_of(starts: Tensor) -> Tensor:
    """starts (B, L) bool -> the chunk of each token (B, L); token 0 starts one anyway."""
    starts = starts.clone()
    starts[:, 0] = True
    return starts.long().cumsum(-1) - 1


def rule_starts(k: Tensor, chunk: int, boundaries: str) -> Tensor:
    """(B, L) bool from keys (B, Hkv, L, D), without a network."""
    batch, length = k.shape[0], k.shape[2]
    at = torch.arange(length, device=k.device)
    if boundaries == "fixed" or length <= chunk:
        return (at % chunk == 0).expand(batch, -1).clone()
    flat = k.transpose(1, 2).flatten(-2)
    apart = 1 - F.cosine_similarity(flat[:, 1:], flat[:, :-1], dim=-1)
    best = apart.topk(max(1, length // chunk - 1), -1).indices + 1
    return torch.zeros(batch, length, dtype=torch.bool, device=k.device).scatter_(1, best, True)


def chunk_keys(k: Tensor, chunks: Tensor, pool: str = "norm") -> Tensor:
    """(B, C, D): sums over a chunk's keys / sqrt(size), or their means, heads averaged; k (B, Hkv, L, D), chunks (B, L)."""
    wide = torch.promote_types(k.dtype, torch.float32)
    flat, count = k.to(wide).mean(1), int(chunks.max()) + 1
    sums = torch.zeros(k.shape[0], count, k.shape[-1], dtype=wide, device=k.device)
    sums.scatter_add_(1, chunks[..., None].expand_as(flat), flat)
    sizes = torch.zeros(k.shape[0], count, dtype=wide, device=k.device).scatter_add_(1, chunks, torch.ones_like(chunks, dtype=wide))
    sizes = sizes.clamp(min=1)
    return sums / (sizes.sqrt() if pool == "norm" else sizes)[..., None]


def token_plan(
    q: Tensor, k: Tensor, view: View, starts: Tensor, *, budget: int, block_size: int, local: int, first: int, dense_last: int,
    chunk: int, boundaries: str, pool: str, window: int | None,
) -> Selection | None:  # fmt: skip
    """Which tokens each block of queries reads (q times scale; a positive factor changes no order)."""
    heads, queries = q.shape[1], q.shape[-2]
    choosing = max(0, queries - dense_last)
    keep = selected_tokens(
        q[..., :choosing, :], k, view.first, starts, budget, block_size, local, first, chunk, boundaries, view, pool, window
    )
    if keep is None:
        return None
    if dense_last:  # in blocks that the border of the last queries does not cut
        size = math.gcd(block_size, choosing)
        keep = keep.repeat_interleave(block_size // size, -2)[:, : choosing // size]
        keep = torch.nn.functional.pad(keep, (0, 0, 0, -(-queries // size) - keep.shape[-2]), value=True)
        block_size = size
    return Selection(keep[:, None].expand(-1, heads, -1, -1), block_size, 1)


def selected_tokens(
    q: Tensor, k: Tensor, offset: int, starts: Tensor, budget: int, block_size: int, local: int, first: int, chunk: int, boundaries: str,
    view: View | None = None, pool: str = "norm", window: int | None = None,
) -> Tensor | None:  # fmt: skip
    """(B, query blocks, Lk) bool, the same for all heads; None: the budget holds everything."""
    length, queries = k.shape[-2], q.shape[-2]
    if budget >= length or queries == 0:
        return None
    given = starts.reshape(-1, starts.shape[-1]).expand(q.shape[0], length) if starts.numel() > 1 else starts.reshape(1, 1)
    chosen = given > 0 if bool((given > 0).any()) else rule_starts(k, chunk, boundaries)
    chunks = chunk_of(chosen.expand(q.shape[0], length))
    wide = torch.promote_types(q.dtype, torch.float32)
    blocks = cut(q.to(wide).mean(1), block_size)
    pooled = blocks.amax(-2) if pool == "max" else blocks.sum(-2) / lengths(queries, block_size, q.device).to(wide).sqrt()[:, None]
    scores = (pooled @ chunk_keys(k, chunks, pool).transpose(-1, -2)).gather(-1, chunks[:, None].expand(-1, pooled.shape[1], -1))
    end = (torch.arange(1, pooled.shape[1] + 1, device=q.device) * block_size + offset).clamp(max=length)[:, None]
    at = torch.arange(length, device=q.device)
    shown = at < end
    shown = shown if window is None else shown & (at >= end - window)
    if view is not None:  # what a mask hides takes nobody's place
        some = view.blocks(block_size, 1)[0].any(1)[:, : pooled.shape[1]]
        shown = shown & (some | (at >= end - min(local, budget)))
    forced = at >= end - min(local, budget)
    ranked = scores.masked_fill(~shown, float("-inf")).masked_fill(forced & shown, float("inf"))
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    keep = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, True) & shown
    if first:  # each takes the place of the chosen token of lowest position
        start = torch.arange(pooled.shape[1], device=q.device)[:, None] * block_size + offset
        begin = torch.zeros_like(start) if window is None else (start - window).clamp(min=0)
        keep = (keep & (keep.cumsum(-1) > first)) | ((at >= begin) & (at < begin + first) & (at < end))
    return keep


def indices(keep: Tensor, budget: int) -> Tensor:
    """(B, blocks, L) bool -> token ids ascending (B, blocks, budget), padded with -1."""
    place = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
    found = torch.where(keep, place, keep.shape[-1]).sort(-1).values[..., :budget]
    return torch.where(found == keep.shape[-1], -1, found)


class BoundaryPredictor(nn.Module):
    """Key states (B, L, H D) -> a boundary logit for the gap after each token (B, L).

    width: w keys either side. hidden: width of a side's summary; inner: of the MLP. pool: "conv" (depthwise convolution, then 1 x 1) or
    "attention" (`heads` heads over the 2 w keys, LayerNorm, mean of either half).
    """

    def __init__(self, dim: int, width: int = 4, hidden: int = 256, pool: str = "conv", inner: int = 256, heads: int = 4):
        super().__init__()
        if pool not in ("conv", "attention"):
            raise RegardError(f"pool={pool!r}; expected conv or attention")
        self.width, self.pool = width, pool
        self.depth = nn.Conv1d(dim, dim, width, groups=dim) if pool == "conv" else None
        self.point = nn.Linear(dim, hidden)
        self.mix = nn.MultiheadAttention(hidden, heads, batch_first=True) if pool == "attention" else None
        self.norm = nn.LayerNorm(hidden) if pool == "attention" else None
        self.mlp = nn.Sequential(nn.Linear(4 * hidden + 1, inner), nn.ReLU(), nn.Linear(inner, 1))

    def forward(self, keys: Tensor) -> Tensor:
        w, length = self.width, keys.shape[1]
        padded = F.pad(keys, (0, 0, w - 1, w))
        if self.depth is not None:
            windows = torch.relu(self.point(torch.relu(self.depth(padded.transpose(1, 2))).transpose(1, 2)))
            left, right = windows[:, :length], windows[:, w : w + length]
        else:
            assert self.mix is not None and self.norm is not None
            around = self.point(padded).unfold(1, 2 * w, 1)[:, :length].transpose(-1, -2).flatten(0, 1)
            mixed = self.norm(around + self.mix(around, around, around, need_weights=False)[0]).unflatten(0, (-1, length))
            left, right = mixed[..., :w, :].mean(-2), mixed[..., w:, :].mean(-2)
        alike = F.cosine_similarity(left, right, dim=-1)[..., None]
        return self.mlp(torch.cat((left, right, (left - right).abs(), left * right, alike), -1)).squeeze(-1)  # type: ignore[no-any-return]


def mass_ratio(p: Tensor, width: int = 4, rows: int | None = None, eps: float = 1e-6) -> Tensor:
    """(B, L): for the gap after each token t, the larger over the smaller of the masses that rows from t + w on put on the w keys before and
    after it.

    p (B, H, L, L): dense probabilities, averaged over heads. rows: how many rows count (None: all). eps: added to both masses. 1 where there is
    no such row.
    """
    a = p.mean(1)
    length, n = a.shape[-1], a.shape[0]
    sums = F.pad(a.cumsum(-2), (0, 0, 1, 0))  # over rows
    totals = F.pad(sums.cumsum(-1), (1, 0))
    t = torch.arange(length, device=p.device)
    top = (t + width).clamp(max=length)
    bottom = torch.full_like(t, length) if rows is None else (top + rows).clamp(max=length)

    def box(begin: Tensor, end: Tensor) -> Tensor:
        begin, end = begin.clamp(0, length), end.clamp(0, length)
        each = torch.arange(n, device=p.device)[:, None]
        return totals[each, bottom, end] - totals[each, bottom, begin] - totals[each, top, end] + totals[each, top, begin]

    past, future = box(t - width + 1, t + 1), box(t + 1, t + 1 + width)
    return (torch.maximum(past, future) + eps) / (torch.minimum(past, future).clamp_min(0) + eps)


def boundary_loss(
    logits: Tensor, ratio: Tensor, real: Tensor | None = None, alpha: float = 4.0, beta: float = 0.0, gamma: float = 2.0,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Focal cross-entropy to the soft labels sigmoid(alpha (log(ratio + eps) - beta)), over real gaps."""
    y = torch.sigmoid(alpha * ((ratio + eps).log() - beta))
    p = torch.sigmoid(logits)
    focus = (y * (1 - p) + (1 - y) * p) ** gamma
    each = focus * F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    return each.mean() if real is None else (each * real).sum() / real.sum().clamp_min(1)


def choose_boundaries(
    scores: Tensor, theta: float, count: int, distance: int = 8, forced: tuple[int, ...] = (), instruction: int | None = None
) -> Tensor:
    """scores (B, L) of the gaps after tokens -> starts (B, L) bool: gaps above theta, best first, none within `distance` of an earlier one,
    at most `count`; token t + 1 starts a chunk. forced: tokens that always start one. instruction: tokens at the end that are an instruction:
    the gap L - instruction is taken first, and none after it."""
    last = scores.shape[1] - (1 if instruction is None else instruction)
    starts = torch.zeros_like(scores, dtype=torch.bool)
    starts[:, 0] = True
    for row, out in zip(scores.detach(), starts, strict=True):
        taken = [at - 1 for at in forced] + ([] if instruction is None else [last])
        for t in row.argsort(descending=True, stable=True).tolist():
            if len(taken) >= count or float(row[t]) <= theta:
                break
            if t < len(row) - 1 and t <= last and all(abs(t - other) >= distance for other in taken):
                taken.append(t)
        out[[t + 1 for t in taken]] = True
    return starts
