"""Checks of window and block kernels: fused neighbourhoods, flash windows, FlashMoBA."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ...catalog import get
from ...engine import attend
from ...mechanisms.selected.flashmoba import KeyConv, flash_moba, flash_top_k, moba_snr, routing_trial
from ...mechanisms.selected.fused_neighborhood import BACKENDS, neighborhood_attention, neighbours
from ...nn.neighborhood import NeighborhoodAttention2D
from ...nn.swin import SwinWindowAttention, region_mask, window_attention
from .. import naive
from ..memory import peak_bytes
from ..verification import check
from .neighborhood import brute
from .selected import qkv

F64 = torch.float64
SETTINGS = (
    ((37,), (7,), (1,), (False,)), ((37,), (5,), (3,), (False,)), ((37,), (6,), (2,), (True,)),
    ((11, 13), (5, 4), (2, 1), (False, True)), ((4, 6, 5), (3, 3, 3), (1, 1, 1), (False, False, False)),
)  # fmt: skip


def product_mask(shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], causal: tuple[bool, ...]) -> Tensor:
    """(L, L): every axis by the window rule in loops."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for n, k, d, c in zip(shape, kernel, dilation, causal, strict=True):
        seen = (seen[:, None, :, None] & brute(n, k, 1, d, c)[None, :, None]).reshape(seen.shape[0] * n, -1)
    return seen


def dense(inputs: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Masked softmax attention of (B, grid, H, D) tensors with all weights written out."""
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in inputs)
    s = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
    return (s.softmax(-1) @ v).transpose(1, 2).unflatten(1, inputs[0].shape[1:-2])


def with_grads(out: Tensor, inputs: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad((out * seed).sum(), inputs)


@check(
    "fused-neighborhood",
    "three backends and their gradients equal the window rule in loops, 1-D, 2-D, 3-D, dilated, causal",
    below=1e-9,
    control="windows cut off at the border",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for shape, kernel, dilation, causal in SETTINGS:
        q, k, v = (torch.randn(2, *shape, 2, 4, dtype=F64, requires_grad=True) for _ in range(3))
        seed = torch.randn_like(q)
        mask = product_mask(shape, kernel, dilation, causal)
        at = torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")).flatten(1)
        step = at[:, :, None] - at[:, None]
        near = torch.tensor([k // 2 * d for k, d in zip(kernel, dilation, strict=True)])[:, None, None]
        cut = (mask & (step.abs() <= near).all(0)) | torch.eye(len(mask), dtype=torch.bool)

        inputs = (q, k, v)
        truth = with_grads(dense(inputs, mask), inputs, seed)
        for backend in BACKENDS:
            out = neighborhood_attention(q, k, v, len(shape), kernel, dilation, causal, backend=backend)
            assert isinstance(out, Tensor)
            own = max(own, *(naive.gap(a, b) for a, b in zip(with_grads(out, inputs, seed), truth, strict=True)))
        other = max(other, naive.gap(dense(inputs, cut), truth[0]))
    return own, other


@check(
    "fused-neighborhood",
    "k = n is full attention, and every query has exactly prod(k) neighbours of its own dilation group: off",
    below=1e-12,
    control="k = n - 2",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 6, 7, 2, 4, dtype=F64) for _ in range(3))
    truth = attend(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))).transpose(1, 2).unflatten(1, (6, 7))
    gaps = [naive.gap(neighborhood_attention(q, k, v, 2, size), truth) for size in ((6, 7), (4, 5))]  # type: ignore[arg-type]
    place, real = neighbours((37,), (5,), (3,), (False,))
    off = float((~real).sum() + (place % 3 != torch.arange(37)[:, None] % 3).sum() + sum(len(row.unique()) != 5 for row in place))
    return gaps[0] + off, gaps[1]


@check(
    "fused-neighborhood",
    "64 x 64, k = 13: peak extra memory of the fused backend, in tensors of the size of q",
    below=8,
    control="the unfused backend",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 64, 64, 4, 32) for _ in range(3))
    peaks = [
        peak_bytes(lambda backend=backend: neighborhood_attention(q, k, v, 2, 13, backend=backend)) for backend in ("fused", "unfused")
    ]
    return peaks[0] / (4 * q.numel()), peaks[1] / (4 * q.numel())


@check("fused-neighborhood", "the layer's relative bias: unfused weights equal a dense bias of offsets", below=1e-10, control="no bias")
def _() -> tuple[float, float]:
    layer, x = NeighborhoodAttention2D(8, 2, 3, bias=True).double(), torch.randn(1, 5, 6, 8, dtype=F64)
    assert layer.bias is not None
    q, k, v = (y.flatten(1, 2).transpose(1, 2) for y in layer.qkv(x).unflatten(-1, (3, 2, -1)).unbind(-3))
    mask, bias = product_mask((5, 6), (3, 3), (1, 1), (False, False)), torch.zeros(2, 30, 30, dtype=F64)
    for i, j in itertools.product(range(30), range(30)):
        if mask[i, j]:
            bias[:, i, j] = layer.bias[:, (j // 6 - i // 6 + 2) * 5 + j % 6 - i % 6 + 2].detach()

    def dense(bias: Tensor) -> Tensor:
        o = (q @ k.transpose(-1, -2) / 2 + bias).masked_fill(~mask, -math.inf).softmax(-1) @ v
        return layer.out(o.transpose(1, 2).flatten(-2)).unflatten(1, (5, 6))  # type: ignore[no-any-return]

    return naive.gap(layer(x), dense(bias)), naive.gap(layer(x), dense(0 * bias))


@check(
    "flash-window-attention",
    "L 9 to 64, D 16 to 128, bias and shift mask: out and dq, dk, dv, dbias equal plain attention",
    below=1e-10,
    control="the bias left out",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for length, dim, shifted in ((9, 16, True), (16, 32, False), (49, 32, True), (64, 128, False)):
        q, k, v = (torch.randn(8, 2, length, dim, dtype=F64, requires_grad=True) for _ in range(3))
        bias = torch.randn(2, length, length, dtype=F64, requires_grad=True)
        side = math.isqrt(length)
        mask = region_mask(2 * side, 2 * side, side, side // 2).double() if shifted else None
        seed = torch.randn_like(q)
        s = q @ k.transpose(-1, -2) * dim**-0.5
        extra = 0.0 if mask is None else mask.repeat(2, 1, 1)[:, None]
        truth, plain = ((s + b + extra).softmax(-1) @ v for b in (bias, 0.0))
        grads = torch.autograd.grad((truth * seed).sum(), (q, k, v, bias), retain_graph=True)
        outs = [window_attention(q, k, v, bias, mask, chunk=chunk) for chunk in (8, 16, dim)]
        mine = torch.autograd.grad((outs[0] * seed).sum(), (q, k, v, bias))
        own = max(own, *(naive.gap(out, truth) for out in outs), *(naive.gap(a, b) for a, b in zip(mine, grads, strict=True)))
        other = max(other, naive.gap(plain, truth))
    return own, other


@check(
    "flash-window-attention",
    "a shifted layer equals dense attention over the map under window and region masks",
    below=1e-10,
    control="the region mask left out",
)
def _() -> tuple[float, float]:
    layer, x = SwinWindowAttention(16, 2, 4, 2).double(), torch.randn(2, 8, 12, 16, dtype=F64)
    at = torch.arange(96)
    y, z = (at // 12 - 2) % 8, (at % 12 - 2) % 12  # places after the roll
    window = (y // 4 == y[:, None] // 4) & (z // 4 == z[:, None] // 4)
    near = ((at // 12)[:, None] - at // 12).abs() < 4
    region = near & (((at % 12)[:, None] - at % 12).abs() < 4)
    index = (y[:, None] % 4 - y % 4 + 3) * 7 + z[:, None] % 4 - z % 4 + 3
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)

    def dense(mask: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 8**-0.5 + layer.table[index].permute(2, 0, 1)
        return layer.out((s.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(-2)).unflatten(1, (8, 12))  # type: ignore[no-any-return]

    out = layer(x)
    layer.flash = False
    return max(naive.gap(out, dense(window & region)), naive.gap(out, layer(x))), naive.gap(out, dense(window))


@check("flash-window-attention", "tensors of L x L kept for the backward pass, beside the bias", below=0, control="the plain path")
def _() -> tuple[float, float]:
    def kept(flash: bool) -> float:
        layer, found = SwinWindowAttention(16, 2, 7, flash=flash), 0

        def look(x: Tensor) -> Tensor:
            nonlocal found
            found += x.dim() == 4 and x.shape[-2:] == (49, 49)
            return x

        with torch.autograd.graph.saved_tensors_hooks(look, lambda x: x):
            layer(torch.randn(1, 14, 14, 16))
        return float(found)

    return kept(True), kept(False)


@check(
    "flashmoba",
    "score gap of a planted key, 20,000 trials, four (B, d): largest relative error of the SNR, and failures within 0.02 of Phi(-SNR)",
    below=0.08,
    control="SNR without the square root of d",
)
def _() -> tuple[float, float]:
    worst = other = 0.0
    for block, dim in ((32, 64), (64, 64), (128, 64), (64, 128)):
        found = routing_trial(block, dim, 0.5)
        snr, failure = moba_snr(block, dim, 0.5)
        worst = max(worst, abs(found.snr / snr - 1), math.inf if abs(found.failure - failure) > 0.02 else 0.0)
        other = max(other, abs(found.snr / (0.5 * math.sqrt(1 / (2 * block))) - 1))
    return worst, other


@check("flashmoba", "three related keys in a block: the mean gap over 3 x 0.5 / B, minus one", below=0.08, control="one key's")
def _() -> tuple[float, float]:
    mean = routing_trial(64, 64, 0.5, related=3).mean
    return abs(mean * 64 / 1.5 - 1), abs(mean * 64 / 0.5 - 1)


@check(
    "flashmoba", "B = 8, k = 4, L = 300, packed too: equals mechanism moba, with gradients and the same blocks", below=1e-9, control="k = 3"
)
def _() -> tuple[float, float]:
    leaves = tuple(x.requires_grad_() for x in qkv(300, 8, 4, 2))
    q, k, v = leaves
    seed = torch.randn(1, 4, 300, 8, dtype=F64)

    def both(out: Tensor) -> tuple[Tensor, ...]:
        return out, *torch.autograd.grad((out * seed).sum(), leaves)

    truth = both(attend(q, k, v, get("moba", block_size=8, top_k=4)))
    own, other = (
        max(naive.gap(a, b) for a, b in zip(both(flash_moba(q, k, v, block_size=8, top_k=n)), truth, strict=True)) for n in (4, 3)
    )
    parts = (90, 203, 7)
    separate = torch.cat(
        [attend(*one, get("moba", block_size=8, top_k=4)) for one in zip(*(x.split(parts, 2) for x in leaves), strict=True)], 2
    )
    own = max(own, naive.gap(flash_moba(q, k, v, block_size=8, top_k=4, lengths=parts), separate))
    centroids = k[:, :, :296].unflatten(2, (37, 8)).mean(3).repeat_interleave(2, 1)
    gate = (q @ centroids.transpose(-1, -2)).masked_fill(torch.arange(37) >= torch.arange(300)[:, None] // 8, -math.inf)
    best = gate.topk(3, -1)
    plain = best.indices.masked_fill(best.values == -math.inf, -1).sort(-1).values
    wrong = float((flash_top_k(q, centroids, 3, 8, tile=5).sort(-1).values != plain).sum())
    return own + wrong, other


@check("flashmoba", "key convolution: zero taps change nothing, a loop's values, causal", below=1e-12, control="taps reversed")
def _() -> tuple[float, float]:
    conv, k = KeyConv(2, 8, 3).double(), torch.randn(1, 2, 20, 8, dtype=F64)
    zero = naive.gap(conv(k), k)
    torch.nn.init.normal_(conv.taps)

    def loop(order: int) -> Tensor:
        out = k.clone()
        for t in range(20):
            mixed = (
                sum(
                    (conv.taps[:, lag][:, None] * k[:, :, t - lag : t - lag + 1] for lag in range(3) if t >= lag),
                    torch.zeros_like(k[:, :, :1]),
                )
                if order == 1
                else sum(
                    (conv.taps[:, 2 - lag][:, None] * k[:, :, t - lag : t - lag + 1] for lag in range(3) if t >= lag),
                    torch.zeros_like(k[:, :, :1]),
                )
            )
            out[:, :, t : t + 1] = k[:, :, t : t + 1] + torch.nn.functional.silu(mixed)
        return out.detach()

    moved = k.clone()
    moved[:, :, 10:] += 1
    ahead = naive.gap(conv(moved)[:, :, :10], conv(k)[:, :, :10])
    return max(zero, ahead, naive.gap(conv(k), loop(1))), naive.gap(conv(k), loop(2))
