"""SampleAttention: a local window and the columns that sampled queries call for (id 241; Zhu et al., 2024).

a_j = sum over sampled rows of softmax(q k^T)_j outside their windows;  columns: the fewest, by falling a, that lift the kept mass to alpha
o = softmax over {j <= i: i - j < window or j a column}
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal, Program, Since, Weighted, Window, bind
from regard.algebra.blocks import heads_of
from regard.algebra.probes import probed
from regard.catalog.registry import register
from regard.engine.composed import Call


@register("sampleattention")
def sampleattention(alpha: float = 0.95, row_ratio: float = 0.05, window_ratio: float = 0.08) -> Program:
    """alpha: mass of the sampled rows to keep (1: everything). row_ratio: share of rows sampled, evenly. window_ratio: window over length.
    Prompts only: a query after others reads everything."""
    return Program(bind(sampled, alpha=alpha, row_ratio=row_ratio, window_ratio=window_ratio), under="causal")


def plan_columns(q: Tensor, k: Tensor, alpha: float, row_ratio: float, window: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(columns (B, H, L) by falling mass, how many of them (B, H)); columns count only outside a row's window."""
    length = k.shape[-2]
    count = max(1, round(row_ratio * length))
    rows = torch.linspace(length / count - 1, length - 1, count, device=q.device).round().long().clamp(min=0)
    far, _ = probed(q[..., rows, :] * scale, k, rows, window)
    near = count - far.sum(-1)
    ordered, ranked = far.sort(dim=-1, descending=True, stable=True)
    kept = near[..., None] + ordered.cumsum(-1)
    needed = ((kept < alpha * count).sum(-1) + 1).clamp(max=length)
    return ranked, torch.where(near >= alpha * count, 0, needed)


def column_set(q: Tensor, k: Tensor, alpha: float, row_ratio: float, window: int) -> Tensor:
    """The chosen columns as (B, H, L) bool."""
    ranked, needed = plan_columns(q, k, alpha, row_ratio, window)
    chosen = torch.arange(ranked.shape[-1], device=q.device) < needed[..., None]
    return torch.zeros_like(chosen).scatter_(-1, ranked, chosen)


def sampled(q: Tensor, k: Tensor, v: Tensor, call: Call, *, alpha: float, row_ratio: float, window_ratio: float) -> Tensor:
    length = k.shape[-2]
    if q.shape[-2] != length or alpha >= 1:
        return call.attend(q, k, v, Weighted(), mask=call.mask, scale=call.scale)
    window = max(1, round(window_ratio * length))
    k, v = heads_of(k, q.shape[1]), heads_of(v, q.shape[1])
    with torch.no_grad():
        ranked, needed = plan_columns(q, k, alpha, row_ratio, window, call.logit_scale(q))
        width = max(1, int(needed.max()))
        real = torch.arange(width, device=q.device) < needed[..., None]
        columns = torch.where(real, ranked[..., :width], length).sort(-1).values
        # A column is read from the query on that has it outside its window; places that are no column never are.
        since = torch.where(columns < length, columns + window, 2 * length)
        place = columns.clamp(max=length - 1)[..., None]
    near = call.with_stats(q, k, v, Weighted(), mask=Causal() & Window(window), scale=call.scale)
    # Queries stand at the end of the keys: positions inside the gathered call are behind by what was left out.
    picked = [x.gather(-2, place.expand(*place.shape[:-1], x.shape[-1])) for x in (k, v)]
    far = call.with_stats(q, *picked, Weighted(mask=Since()), scale=call.scale, since=since - (length - width))
    return call.merge([near, far])


def cra(q: Tensor, k: Tensor, keep: Tensor, scale: float | None = None) -> Tensor:
    """Cumulative residual attention, (B, H, L): each causal row's mass inside keep (B or 1, H or 1, L, L)."""
    k = heads_of(k, q.shape[1])
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    causal = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (s.masked_fill(~causal, float("-inf")).softmax(-1) * (keep & causal)).sum(-1)


def tune(
    q: Tensor,
    k: Tensor,
    alphas: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98),
    target: float = 0.95,
    row_ratio: float = 0.05,
    window_ratio: float = 0.08,
) -> float:
    """The smallest alpha whose mean CRA over all rows of a calibration prompt reaches `target` (the largest when none does)."""
    length, window = k.shape[-2], max(1, round(window_ratio * k.shape[-2]))
    at = torch.arange(length, device=q.device)
    for alpha in sorted(alphas):
        keep = column_set(q * q.shape[-1] ** -0.5, k, alpha, row_ratio, window)[..., None, :] | (at[:, None] - at < window)
        if float(cra(q, k, keep).mean()) >= target:
            return alpha
    return max(alphas)
