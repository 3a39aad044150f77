"""What a layer puts around its mechanism, written out from the layer's own parameters."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


def drawn(layer: Layer, spread: float = 0.3) -> Layer:
    """The layer in float64 with every parameter moved by random numbers: factors of norms are then not one, and biases not zero."""
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return layer


def misshapen(layer: nn.Module, shapes: dict[str, tuple[int, ...]]) -> float:
    """How many of the layer's parameters, biases included, are not those named, or of other shapes."""
    found = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    return float(sum(found.get(name) != shapes.get(name) for name in found.keys() | shapes.keys()))


def split(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads * D) -> (B, heads, L, D)."""
    return torch.stack(x.chunk(heads, -1), 1)


def joined(o: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads * D)."""
    return torch.cat(o.unbind(1), -1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x over the root of its mean square plus eps, over the last dimension."""
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension."""
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_tc = sum_i w_ci x_(t - width + 1 + i)c, tokens before the first being zero: x (B, L, channels), weight (channels, 1, width)."""
    width = weight.shape[-1]
    out = torch.zeros_like(x) if bias is None else bias.expand_as(x).clone()
    for t in range(x.shape[1]):
        for i in range(width):
            if t - width + 1 + i >= 0:
                out[:, t] += weight[:, 0, i] * x[:, t - width + 1 + i]
    return out
