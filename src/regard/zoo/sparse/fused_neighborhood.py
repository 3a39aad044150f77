"""Neighbourhood attention on grids, three ways that agree: loops, explicit weights, tiles (id 118; Hassani et al., 2024).

o_x = softmax over y in W(x) of (scale q_x.k_y [+ bias_{y-x}]) v_y, W(x) exactly prod(kernel) tokens of x's dilation group, shifted at borders
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.algebra import Neighborhood, Weighted
from regard.algebra.neighborhood import window_of
from regard.catalog.registry import register
from regard.engine.door import attend, attend_with_stats
from regard.errors import RegardError

Axes = int | tuple[int, ...]
BACKENDS = ("fused", "unfused", "naive")


def neighbours(
    shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], causal: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """(places (L, prod(kernel)) of each token's neighbours in row-major order, which of them exist): causal windows hold fewer at the start."""
    place, real = torch.zeros((*shape, 1), dtype=torch.long), torch.ones((*shape, 1), dtype=torch.bool)
    for axis, (length, k, d, c) in enumerate(zip(shape, kernel, dilation, causal, strict=True)):
        x = torch.arange(length)
        group = x % d
        first, last = window_of(x // d, (length - group + d - 1) // d, k, 1, c)
        steps = first[:, None] + torch.arange(k)
        coordinate = (steps * d + group[:, None]).clamp(max=length - 1)
        view = [1] * len(shape)
        view[axis] = length
        inner = math.prod(shape[axis + 1 :])
        place = (place[..., :, None] + (coordinate * inner).view(*view, 1, k)).flatten(-2)
        real = (real[..., :, None] & (steps <= last[:, None]).view(*view, 1, k)).flatten(-2)
    total = math.prod(kernel)
    return place.expand(*shape, total).reshape(-1, total), real.expand(*shape, total).reshape(-1, total)


def unfused(q: Tensor, k: Tensor, v: Tensor, place: Tensor, real: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """q, k, v (B, H, L, D): logits (B, H, L, window) by products with gathered keys, softmax, products with gathered values."""
    s = (q[..., None, :] * k[:, :, place]).sum(-1) * scale
    s = s if bias is None else s + bias
    p = s.masked_fill(~real, float("-inf")).softmax(-1)
    return (p[..., None] * v[:, :, place]).sum(-2)


def naive(q: Tensor, k: Tensor, v: Tensor, place: Tensor, real: Tensor, scale: float) -> Tensor:
    """One token after the other."""
    rows = []
    for x in range(q.shape[2]):
        at = place[x][real[x]]
        p = (k[:, :, at] @ q[:, :, x, :, None] * scale).softmax(-2)
        rows.append((p * v[:, :, at]).sum(-2))
    return torch.stack(rows, 2)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: int,
    kernel_size: Axes,
    dilation: Axes = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    backend: str = "fused",
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q, k, v (B, X[, Y[, Z]], H, D) -> the same shape, and (B, X.., H) log-sum-exps if asked (fused).

    backend: "fused" (tiles, memory O(L D)), "unfused" (weights (B, H, L, window) exist; the only one with `bias` (H, prod(2 k - 1))) or "naive".
    """
    if q.dim() != axes + 3 or backend not in BACKENDS:
        raise RegardError(
            f"q has shape {tuple(q.shape)}, backend={backend!r}: expected {axes + 3} dimensions (B, grid, H, D), and one of {', '.join(BACKENDS)}"
        )
    kernel, dilated = (x if isinstance(x, tuple) else (x,) * axes for x in (kernel_size, dilation))
    causal = is_causal if isinstance(is_causal, tuple) else (is_causal,) * axes
    shape = tuple(q.shape[1:-2])
    mask = Neighborhood(shape, kernel, 1, dilated, causal)  # refuses windows that do not fit
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (bias is not None and backend != "unfused") or (return_lse and backend != "fused"):
        raise RegardError(f"backend={backend!r}: a relative bias needs 'unfused', log-sum-exps need 'fused'")
    if backend == "fused":
        if return_lse:
            out, stats = attend_with_stats(q, k, v, Weighted(mask=mask), scale=scale)
            lse = (stats.shift + stats.total.log()).squeeze(-1)
            return out.transpose(1, 2).unflatten(1, shape), lse.transpose(1, 2).unflatten(1, shape)
        o = attend(q, k, v, Weighted(mask=mask), scale=scale)
    else:
        place, real = (x.to(q.device) for x in neighbours(shape, kernel, dilated, causal))
        if backend == "naive":
            o = naive(q, k, v, place, real, scale)
        else:
            table = None if bias is None else bias[:, offsets(place, shape, kernel, dilated)]
            o = unfused(q, k, v, place, real, scale, table)
    return o.transpose(1, 2).unflatten(1, shape)


def offsets(place: Tensor, shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Index of (y - x) / dilation into a table of prod(2 k - 1) biases, (L, window)."""
    own, index = torch.arange(place.shape[0], device=place.device)[:, None], torch.zeros_like(place)
    inner = math.prod(shape)
    for length, k, d in zip(shape, kernel, dilation, strict=True):
        inner //= length
        step = (place // inner % length - own // inner % length) // d + k - 1
        index = index * (2 * k - 1) + step.clamp(0, 2 * k - 2)
    return index


def na1d(q: Tensor, k: Tensor, v: Tensor, kernel_size: Axes, **options: object) -> Tensor:
    """`neighborhood_attention` on lines: q, k, v (B, X, H, D)."""
    return neighborhood_attention(q, k, v, 1, kernel_size, **options)  # type: ignore[arg-type, return-value]


@register("fused-neighborhood", kind="module")
def na2d(q: Tensor, k: Tensor, v: Tensor, kernel_size: Axes, **options: object) -> Tensor:
    """`neighborhood_attention` on maps: q, k, v (B, X, Y, H, D)."""
    return neighborhood_attention(q, k, v, 2, kernel_size, **options)  # type: ignore[arg-type, return-value]


def na3d(q: Tensor, k: Tensor, v: Tensor, kernel_size: Axes, **options: object) -> Tensor:
    """`neighborhood_attention` on volumes: q, k, v (B, X, Y, Z, H, D)."""
    return neighborhood_attention(q, k, v, 3, kernel_size, **options)  # type: ignore[arg-type, return-value]


class NeighborhoodAttention2D(nn.Module):
    """x (B, X, Y, dim) -> (B, X, Y, dim). bias: a learned relative bias, which needs explicit weights."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: Axes = 7,
        *,
        dilation: Axes = 1,
        causal: bool | tuple[bool, bool] = False,
        bias: bool = False,
    ):
        super().__init__()
        self.heads, self.kernel_size, self.dilation, self.causal = heads, kernel_size, dilation, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * 2
        self.bias = nn.Parameter(0.02 * torch.randn(heads, (2 * sizes[0] - 1) * (2 * sizes[1] - 1))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        backend = "fused" if self.bias is None else "unfused"
        o = na2d(q, k, v, self.kernel_size, dilation=self.dilation, is_causal=self.causal, backend=backend, bias=self.bias)
        return self.out(o.flatten(-2))  # type: ignore[no-any-return]
