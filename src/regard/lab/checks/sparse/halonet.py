"""Checks of halonet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.halonet import HaloAttention2d, HaloNet


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
                    # by pixels, or by the place of the query in the down-sampled block
                    down, right = ((y // b * b + y % b // layer.stride) if layer.step_of_query == 1 else y for y in (i, j))
                    relative = layer.rel_h[a - down + p - 1] + layer.rel_w[c - right + p - 1]
                    relative = relative * {"unscaled": 1.0, "scaled": d**-0.5, "none": 0.0}[layer.relative]
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


@check(
    "halonet",
    "options equal the loop: scaled relative logits, biases, another width of values, places of down-sampled queries, pooled strides",
    below=1e-10,
    control="places by pixels",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, own = torch.randn(2, 6, 8, 8, dtype=F64), 0.0
    sizes: dict[str, Any] = {"block": 4, "halo": 1, "head_dim": 4}
    for options in (
        {"relative": "scaled", "bias": True, "masked": False},
        {"value_dim": 5, "project": True},
        {"out": 9},
        {"stride": 2, "steps": "queries"},
    ):
        layer = HaloAttention2d(6, heads=3, **{**sizes, **options}).double()
        own = max(own, naive.gap(layer(x), halo_loop(layer, x)))
    truth, layer.step_of_query = halo_loop(layer, x), 2
    other = naive.gap(layer(x), truth)
    pooled = HaloAttention2d(6, heads=3, stride=2, pool=True, **sizes).double()
    plain = halo_loop(pooled, x)
    mean = (plain[..., ::2, ::2] + plain[..., 1::2, ::2] + plain[..., ::2, 1::2] + plain[..., 1::2, 1::2]) / 4
    return max(own, naive.gap(pooled(x), mean)), other


@check(
    "halonet",
    "a bottleneck and a net of two stages equal their parts put together by hand, in evaluation",
    below=1e-10,
    control="without the skip's batch norm",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    net, x = HaloNet(5, widths=(8, 16), block=4, halo=1).double(), torch.randn(2, 3, 16, 16, dtype=F64)
    net(x)  # running statistics that are not the initial ones
    net.eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)

    def point(y: Tensor, conv: Any, step: int = 1) -> Tensor:
        return torch.einsum("bchw,dc->bdhw", y[..., ::step, ::step], conv.weight[..., 0, 0])

    def norm(y: Tensor, m: Any) -> Tensor:
        mean, spread, weight, bias = (z[:, None, None] for z in (m.running_mean, m.running_var, m.weight, m.bias))
        return (y - mean) / (spread + 1e-5).sqrt() * weight + bias

    def silu(y: Tensor) -> Tensor:
        return y / (1 + torch.exp(-y))

    def by_hand(skip_norm: bool) -> Tensor:
        around = torch.nn.functional.pad(x, (1, 1, 1, 1))
        y = sum(
            torch.einsum("bchw,dc->bdhw", around[..., a : a + 16, b : b + 16], net.stem.weight[..., a, b])
            for a in range(3)
            for b in range(3)
        )
        for n, stage in enumerate(net.stages):
            body: Any = stage.body
            inner = silu(norm(point(y, body[0]), body[1]))
            assert body[3].stride == n + 1
            inner = silu(norm(halo_loop(body[3], inner), body[4]))
            inner = norm(point(inner, body[6]), body[7])
            if n:
                side = point(y, stage.skip[0], 2)  # type: ignore[index]
                y = silu(inner + (norm(side, stage.skip[1]) if skip_norm else side))  # type: ignore[index]
            else:
                y = silu(inner + y)
        return y.mean((2, 3)) @ net.head.weight.T + net.head.bias  # type: ignore[union-attr]

    return naive.gap(net(x), by_hand(True)), naive.gap(net(x), by_hand(False))
