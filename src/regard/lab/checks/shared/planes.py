"""Layers of maps (B, C, H, W): parameters and running statistics moved off their first values, norms and convolutions by definition."""

from __future__ import annotations

import itertools
from typing import TypeVar

import torch
from torch import Tensor, nn

from regard.lab.checks.shared.layers import drawn

Layer = TypeVar("Layer", bound=nn.Module)


def settled(layer: Layer, spread: float = 0.3) -> Layer:
    """`drawn`, with running means and variances of batch norms that are neither 0 nor 1, in evaluation mode."""
    layer = drawn(layer, spread).eval()
    for part in layer.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.copy_(torch.randn_like(part.running_mean))
            part.running_var.copy_(0.5 + torch.rand_like(part.running_var))
    return layer


def image(*shape: int) -> Tensor:
    """A random map in float64 that asks for gradients."""
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def batch_norm(x: Tensor, norm: nn.Module, eps: float = 1e-5) -> Tensor:
    """By the running statistics, over channels (dim 1)."""
    mean, var, weight, bias = (
        getattr(norm, name).view(-1, *[1] * (x.dim() - 2)) for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + eps).sqrt() * weight + bias


def layer_norm(x: Tensor, norm: nn.Module, eps: float = 1e-5) -> Tensor:
    """Over the last dimension."""
    gap = x - x.mean(-1, keepdim=True)
    return gap / (gap.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias  # type: ignore[operator]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, stride: int = 1) -> Tensor:
    """sum_ab w[c, a, b] x[c, s i + d (a - r), s j + d (b - r)], zero outside: x (B, C, H, W), weight (C, 1, k, k), k odd."""
    k, (h, w) = weight.shape[-1], x.shape[2:]
    reach = dilation * (k // 2)
    wide = torch.nn.functional.pad(x, (reach,) * 4)
    out = torch.zeros_like(x) if bias is None else bias[:, None, None].expand_as(x)
    for a, b in itertools.product(range(k), repeat=2):
        out = out + weight[:, 0, a, b, None, None] * wide[:, :, a * dilation : a * dilation + h, b * dilation : b * dilation + w]
    return out[:, :, ::stride, ::stride]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1 x 1 convolution: weight (O, C, 1, 1) or (O, C)."""
    out = torch.einsum("oc,bchw->bohw", weight.flatten(1), x)
    return out if bias is None else out + bias[:, None, None]


def gelu(x: Tensor) -> Tensor:
    """GELU by its definition, x Phi(x)."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))
