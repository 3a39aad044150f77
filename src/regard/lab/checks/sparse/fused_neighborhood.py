"""Checks of fused-neighborhood."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.window_kernels import SETTINGS, dense, product_mask, with_grads
from regard.lab.memory import peak_bytes
from regard.lab.verification import check
from regard.zoo.sparse.fused_neighborhood import BACKENDS, NeighborhoodAttention2D, neighborhood_attention, neighbours


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
    "fused-neighborhood",
    "log-sum-exps equal a loop over windows; a dilated causal layer's relative bias a table read by steps of its dilation",
    below=1e-10,
    control="a scale left out of the log-sum-exps",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 6, 7, 2, 4, dtype=F64) for _ in range(3))
    kernel, dilation, causal = (3, 2), (2, 1), (False, True)
    out, lse = neighborhood_attention(q, k, v, 2, kernel, dilation, causal, scale=0.7, return_lse=True)
    mask = product_mask((6, 7), kernel, dilation, causal)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    logits = (0.7 * flat[0] @ flat[1].transpose(-1, -2)).masked_fill(~mask, -math.inf)
    truth = logits.exp().sum(-1).log().transpose(1, 2).unflatten(1, (6, 7))
    own = max(naive.gap(lse, truth), naive.gap(out, (logits.softmax(-1) @ flat[2]).transpose(1, 2).unflatten(1, (6, 7))))

    layer, x = (
        NeighborhoodAttention2D(8, 2, kernel, dilation=dilation, causal=causal, bias=True).double(),
        torch.randn(1, 6, 7, 8, dtype=F64),
    )
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    a, b, c = (y.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    s = (a @ b.transpose(-1, -2) / 2).masked_fill(~mask, -math.inf)
    table = torch.zeros(2, 42, 42, dtype=F64)
    for i, j in itertools.product(range(42), range(42)):
        if mask[i, j]:
            down, right = (j // 7 - i // 7) // 2, j % 7 - i % 7  # in steps of the dilation
            table[:, i, j] = layer.bias[:, (down + 2) * 3 + right + 1].detach()
    biased = ((s + table).softmax(-1) @ c).transpose(1, 2).flatten(-2)
    own = max(own, naive.gap(layer(x), layer.out(biased).unflatten(1, (6, 7))))
    return own, naive.gap(lse, (logits / 0.7).exp().sum(-1).log().transpose(1, 2).unflatten(1, (6, 7)))
