"""Checks of halonet."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.halonet import HaloAttention2d


def halo_loop(layer: HaloAttention2d, x: Tensor) -> Tensor:
    """Pixel by pixel, as written in the paper."""
    n, _, height, width = x.shape
    b, h, p, d, e = layer.block, layer.halo, layer.patch, layer.head_dim, layer.value_dim
    q, kv = layer.q(x).unflatten(1, (layer.heads, d)), layer.kv(x).unflatten(1, (layer.heads, d + e))
    out = torch.zeros(n, layer.heads, e, height // layer.stride, width // layer.stride, dtype=x.dtype)
    for i in range(0, height, layer.stride):
        for j in range(0, width, layer.stride):
            top, left = i // b * b - h, j // b * b - h
            logits, values = [], []
            for a in range(top, top + p):
                for c in range(left, left + p):
                    inside = 0 <= a < height and 0 <= c < width
                    if not inside and layer.masked:
                        continue
                    kk, vv = (
                        kv[..., a, c].split((d, e), -1)
                        if inside
                        else (torch.zeros(n, layer.heads, d, dtype=x.dtype), torch.zeros(n, layer.heads, e, dtype=x.dtype))
                    )
                    relative = layer.rel_h[a - i + p - 1] + layer.rel_w[c - j + p - 1]
                    logits.append((q[..., i, j] * (d**-0.5 * kk + relative)).sum(-1))
                    values.append(vv)
            w = torch.stack(logits, -1).softmax(-1)
            out[..., i // layer.stride, j // layer.stride] = torch.einsum("nhk,knhe->nhe", w, torch.stack(values))
    return layer.project(out.flatten(1, 2))  # type: ignore[no-any-return]


@check(
    "halonet",
    "equals a loop over pixels for (b, h) = (4, 2), (4, 1), (6, 3), padding masked and not, and stride 2",
    below=1e-10,
    control="relative logits left out",
)
def _() -> tuple[float, float]:
    x, own, other = torch.randn(2, 6, 12, 12, dtype=F64), 0.0, 0.0
    for block, halo, masked, stride in ((4, 2, True, 1), (4, 1, False, 1), (6, 3, True, 1), (6, 3, False, 1), (4, 1, True, 2)):
        layer = HaloAttention2d(6, 6, 3, block=block, halo=halo, masked=masked, stride=stride, head_dim=4).double()
        truth = halo_loop(layer, x).detach()
        own = max(own, naive.gap(layer(x), truth))
        layer.relative = "none"
        other = max(other, naive.gap(layer(x), truth))
    return own, other


@check("halonet", "h = 0 without relative logits is window attention", below=1e-12, control="h = 1")
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 6, 12, 12, dtype=F64), []
    for halo in (0, 1):
        torch.manual_seed(1)
        layer = HaloAttention2d(6, 6, 3, block=4, halo=halo, head_dim=4, relative="none").double()
        windows = x.unflatten(3, (3, 4)).unflatten(2, (3, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        q, kv = (
            layer.q(windows).flatten(2).unflatten(1, (3, 4)).transpose(-1, -2),
            layer.kv(windows).flatten(2).unflatten(1, (3, 6)).transpose(-1, -2),
        )
        o = attend(q, *kv.split((4, 2), -1)).transpose(-1, -2).flatten(1, 2).unflatten(2, (4, 4))
        truth = o.unflatten(0, (2, 3, 3)).permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3)
        gaps.append(naive.gap(layer(x), truth))
    return gaps[0], gaps[1]


@check("halonet", "moving the map by a block moves the output (interior): gap", below=1e-10, control="moving it by one pixel")
def _() -> tuple[float, float]:
    layer, x = HaloAttention2d(6, 6, 3, block=4, halo=1, head_dim=4).double(), torch.randn(1, 6, 24, 24, dtype=F64)
    out = layer(x)
    return tuple(naive.gap(layer(x.roll(step, -1))[..., 8:16, 12:16], out.roll(step, -1)[..., 8:16, 12:16]) for step in (4, 1))  # type: ignore[return-value]
