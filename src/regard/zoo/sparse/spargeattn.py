"""SpargeAttn: blocks by pooled scores where a block's tokens are alike, everything where they are not (id 24; Zhang et al., 2025).

poolable(X) = |mean_r x_r / |x_r||^2 > theta;  P = softmax(mean(Q_u).mean(K_w)) over poolable key blocks
row u keeps its largest entries while their sum stays <= tau, and every key block that is not poolable; rows not poolable keep all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, Selection, Sizes, View, Weighted, bind
from regard.algebra.blocks import cut, heads_of, lengths, pooled, probabilities, top_k
from regard.algebra.select import scoring
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError

Head = float | tuple[float, ...]


@register("spargeattn")
def sparge(
    theta: Head | None = None,
    tau: Head = 0.98,
    block_q: int = 128,
    block_k: int = 64,
    ratio: Head | None = None,
    first: bool = False,
    causal: bool = False,
    smooth: bool = True,
) -> Weighted:
    """theta: self-similarity above which a block is pooled (None: 0.6, or -0.1 with a ratio, as released); tau: mass to keep (from 1 on: all).
    ratio: keep this share of all blocks, int(ratio n) of a row, instead of a mass. Each a number, or one a head. first: always the first key
    block. smooth: measure keys without their mean over the tokens. Prompts only: one query reads everything."""
    theta = (0.6 if ratio is None else -0.1) if theta is None else theta
    constants = {"theta": theta, "tau": tau, "block_q": block_q, "block_k": block_k, "ratio": ratio, "first": first, "smooth": smooth}
    chosen = Chosen(
        bind(sparge_plan, **constants), ahead=True, decode=False, cost=bind(pooled_cost, block_q=block_q, block_k=block_k), by_sequence=True
    )
    return Weighted(mask=Causal(), select=chosen) if causal else Weighted(select=chosen)


def pooled_cost(sizes: Sizes, *, block_q: int, block_k: int) -> int:
    """Blocks of queries against blocks of keys."""
    return scoring(sizes, sizes.q_len / block_q, sizes.k_len / block_k)


def self_similarity(x: Tensor, size: int) -> Tensor:
    """|mean of unit tokens|^2 of each block: the mean cosine over all ordered pairs. (..., n); -1 for a block that is not full."""
    units = cut(torch.nn.functional.normalize(x, dim=-1), size).mean(-2)
    return units.square().sum(-1).masked_fill(lengths(x.shape[-2], size, x.device) < size, -1.0)


def by_head(value: Head, like: Tensor) -> Tensor:
    """A number, or one a head, to compare with (B, H, nq, nk)."""
    found = torch.tensor(value, dtype=like.dtype, device=like.device)
    if found.dim() and len(found) != like.shape[1]:
        raise RegardError(f"{len(found)} values for {like.shape[1]} heads; expected one, or one a head")
    return found.reshape(-1, 1, 1)


def sparge_plan(
    q: Tensor, k: Tensor, view: View, *, theta: Head, tau: Head, block_q: int, block_k: int, ratio: Head | None, first: bool, smooth: bool
) -> Selection:
    """Which key blocks each block of queries reads (q times scale; centring keys changes no weight, but what is alike)."""
    k = heads_of(k, q.shape[1])
    k = k - k.mean(-2, keepdim=True) if smooth else k
    scores = pooled(q, block_q) @ pooled(k, block_k).transpose(-1, -2)
    bound = by_head(theta, scores)[..., 0]
    alike_q, alike_k = self_similarity(q, block_q) > bound, self_similarity(k, block_k) > bound
    seen = view.blocks(block_q, block_k)[0].expand(scores.shape)
    allowed = seen & alike_k[..., None, :]
    p = probabilities(scores, allowed)
    if ratio is not None:
        share = by_head(ratio, scores.new_empty(1, scores.shape[1], 1, 1, dtype=torch.float64))
        keep = top_k(p, allowed, (share * scores.shape[-1]).long().clamp(min=1))
    else:
        limit = by_head(tau, scores)
        keep = kept_mass(p, limit) | top_k(p, allowed, 1) | (allowed & (limit >= 1))
    keep = keep | ~alike_k[..., None, :] | ~alike_q[..., None]
    if first:
        keep = keep | (torch.arange(keep.shape[-1], device=keep.device) == 0)
    return Selection(keep & seen, block_q, block_k)


def kept_mass(p: Tensor, limit: Tensor) -> Tensor:
    """The largest entries of each row while their sum stays <= limit (a number a head)."""
    ordered, ranked = p.sort(dim=-1, descending=True, stable=True)
    chosen = (ordered.cumsum(-1) <= limit) & (ordered > 0)
    return torch.zeros_like(chosen).scatter_(-1, ranked, chosen)


@dataclass(frozen=True, eq=False)
class Sparged:
    """out (B, H, Lq, D); keep: the block map; qk_sparsity: share of visible tiles not scored; pv_skips: tiles scored but not multiplied with v."""

    out: Tensor
    keep: Tensor
    qk_sparsity: float
    pv_skips: int


def int8(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Steps of each block of (..., L, D), (..., n, size, D), whole numbers, and the blocks' scales (..., n, 1, 1)."""
    blocks = cut(x, size)
    scale = blocks.abs().amax((-1, -2), keepdim=True) / 127 + 1e-7
    return torch.trunc(blocks / scale + 0.5 * blocks.sign()), scale  # halves away from zero


def quantised(x: Tensor, size: int) -> Tensor:
    """x as int8 with one scale a block sees it: round(x / s) s, s = max|x| / 127 + 1e-7."""
    steps, scale = int8(x, size)
    return (steps * scale).flatten(-3, -2)[..., : x.shape[-2], :]


def sparge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    theta: Head = 0.6,
    tau: Head = 0.98,
    pv_lambda: float | None = None,
    quant: str | None = None,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
) -> Sparged:
    """Both stages, tile by tile: q, k, v (B, H, L, D). pv_lambda: a kept tile whose largest weight lies 2^-lambda under its rows' running
    maximum adds nothing (None: off). quant: "int8" scores from quantised q and centred k."""
    from regard.engine.problem import sizes_of, view_of

    if quant not in (None, "int8"):
        raise RegardError(f"quant={quant!r}; expected None or 'int8'")
    k, v = heads_of(k, q.shape[1]), heads_of(v, q.shape[1])
    sizes, mask = sizes_of(q, k, v), sparge(theta, tau, block_q, block_k, causal=causal).mask
    scaled = q * (sizes.head_dim**-0.5 if scale is None else scale)
    view = view_of(mask, sizes, {}, q.device)  # type: ignore[arg-type]
    keep = sparge_plan(scaled, k, view, theta=theta, tau=tau, block_q=block_q, block_k=block_k, ratio=None, first=False, smooth=True).keep
    if quant:
        scaled, k = quantised(scaled, block_q), quantised(k - k.mean(-2, keepdim=True), block_k)
    out, skips = torch.zeros_like(v[..., :1, :]).expand(*q.shape[:-1], -1).clone(), 0
    for u in range(keep.shape[2]):
        rows = slice(u * block_q, min((u + 1) * block_q, sizes.q_len))
        at = torch.arange(rows.start, rows.stop, device=q.device) + view.first
        top = q.new_full((*q.shape[:2], len(at), 1), float("-inf"))
        total, sums = torch.zeros_like(top), q.new_zeros(*q.shape[:2], len(at), v.shape[-1])
        for w in range(keep.shape[3]):
            columns = slice(w * block_k, min((w + 1) * block_k, sizes.k_len))
            seen = keep[:, :, u, w, None, None] & view.visible(at)[..., columns]
            s = (scaled[..., rows, :] @ k[..., columns, :].transpose(-1, -2)).masked_fill(~seen, float("-inf"))
            local = s.amax(-1, keepdim=True)
            now = torch.maximum(top, local)
            fade = torch.exp(torch.where(now.isfinite(), top - now, 0.0)).nan_to_num(0.0)
            gap = torch.where(seen.any(-1, keepdim=True), local - now, float("-inf")).amax((-1, -2), keepdim=True) * 1.4426950408889634
            used = keep[:, :, u, w, None, None] & ((gap + (float("inf") if pv_lambda is None else pv_lambda)) > 0)
            skips += int((keep[:, :, u, w, None, None] & ~used).sum())
            p = torch.where(used & seen, torch.exp(s - torch.where(now.isfinite(), now, 0.0)), 0.0)
            total, sums, top = total * fade + p.sum(-1, keepdim=True), sums * fade + p @ v[..., columns, :], now
        out[..., rows, :] = torch.where(total > 0, sums / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    visible = view.blocks(block_q, block_k)[0].expand(keep.shape)
    return Sparged(out, keep, 1 - float(keep.sum()) / float(visible.sum()), skips)


@dataclass
class SpargeTuner:
    """fit(q, k, v) -> self with theta, tau and pv_lambda, one number a head; heads that gain less than `worthwhile` stay dense.

    l1, pv_l1: bounds on sum|o - o_ref| / sum|o_ref| after the choice of blocks, and after skipping products. grid: step of theta.
    """

    causal: bool = False
    l1: float = 0.07
    pv_l1: float = 0.08
    grid: float = 1 / 16
    block_q: int = 128
    block_k: int = 64
    worthwhile: float = 0.1
    theta: tuple[float, ...] = field(default=(), init=False)
    tau: tuple[float, ...] = field(default=(), init=False)
    pv_lambda: tuple[float, ...] = field(default=(), init=False)

    def fit(self, q: Tensor, k: Tensor, v: Tensor) -> SpargeTuner:
        """q (B, H, L, D), k, v (B, Hkv, L, D): a few calibration prompts."""
        share = q.shape[1] // k.shape[1]
        found = [self.fit_head(q[:, h : h + 1], *(x[:, h // share : h // share + 1] for x in (k, v))) for h in range(q.shape[1])]
        self.theta, self.tau, self.pv_lambda = (tuple(column) for column in zip(*found, strict=True))
        return self

    def fit_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float, float]:
        truth = attend(q, k, v, sparge(1.0, 1.0, causal=self.causal))
        sizes = {"block_q": self.block_q, "block_k": self.block_k, "causal": self.causal}

        def error(out: Tensor) -> float:
            return float((out - truth).abs().sum() / truth.abs().sum())

        tried: list[tuple[float, float, float, float]] = []
        for theta in torch.arange(-1, 1 + 1e-9, self.grid).tolist():
            tau = smallest(lambda tau, theta=theta: error(attend(q, k, v, sparge(theta, tau, **sizes))) < self.l1, 0.0, 1.0, 1e-3)  # type: ignore[misc, arg-type]
            low = smallest(
                lambda low, theta=theta, tau=tau: (
                    error(  # type: ignore[misc]
                        sparge_attention(q, k, v, theta=theta, tau=tau, pv_lambda=low, **sizes).out  # type: ignore[arg-type]
                    )
                    < self.pv_l1
                ),
                0.0,
                50.0,
                0.1,
            )
            tried.append((theta, tau, low, sparge_attention(q, k, v, theta=theta, tau=tau, **sizes).qk_sparsity))  # type: ignore[arg-type]
        bins: dict[int, list[tuple[float, float, float, float]]] = {}
        for one in tried:
            bins.setdefault(int((one[0] + 1) // (2 / 16)), []).append(one)
        best = max(bins.values(), key=lambda group: sum(one[3] for one in group))
        if sum(one[3] for one in best) / len(best) <= self.worthwhile:
            return 1.0, 1.0, 50.0
        return max(x[0] for x in best), max(x[1] for x in best), max(x[2] for x in best)


def smallest(good: Callable[[float], bool], low: float, high: float, step: float) -> float:
    """The least value (to `step`) that is good, where larger values are better; `high` when none is."""
    while high - low > step:
        middle = (low + high) / 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high
