"""ELU plus one, rotary positions on a grid, and what layers of images add to their mechanism, written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.nn.images.grid import GridAttention


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(x))


def turned(x: Tensor, width: int) -> Tensor:
    """Two-dimensional rotary as complex numbers, a token and a pair of channels at a time."""
    n, d = x.shape[-2:]
    out = x.clone()
    for t in range(n):
        for pair in range(d // 2):
            quarter = d // 4
            at, rate = (t // width, pair) if pair < quarter else (t % width, pair - quarter)
            angle = at * 10000 ** -(rate / max(quarter - 1, 1))
            z = torch.complex(x[..., t, 2 * pair], x[..., t, 2 * pair + 1]) * complex(math.cos(angle), math.sin(angle))
            out[..., t, 2 * pair], out[..., t, 2 * pair + 1] = z.real, z.imag
    return out


def around(layer: GridAttention, o: Tensor, v: Tensor, x: Tensor, *, norm: bool = False, gate: str = "", shared: bool = False) -> Tensor:
    """o, v (B, heads, N, D): o plus a depthwise 5 x 5 convolution of v on the layer's grid (shared: one for all heads), LayerNorm, a gate,
    the last projection."""
    b, heads, n, d = v.shape
    plane = v.mT.unflatten(-1, layer.shape)
    assert layer.local is not None
    weight, bias = layer.local.weight, layer.local.bias
    assert bias is not None
    if shared:
        weight, bias = weight.repeat(heads, 1, 1, 1), bias.repeat(heads)
    local = F.conv2d(plane.flatten(1, 2), weight, bias, padding=2, groups=heads * d).unflatten(1, (heads, d)).flatten(3).mT
    y = (o + local).transpose(1, 2).reshape(b, n, heads * d)
    if norm:
        assert layer.norm is not None
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
    if gate:
        assert layer.gate is not None
        g = x @ layer.gate.weight.T + layer.gate.bias
        y = y * (g / (1 + torch.exp(-g)) if gate == "silu" else g)
    return y @ layer.out.weight.T + layer.out.bias
