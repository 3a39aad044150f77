"""What rounding weights costs a trained model: outliers, which sinks bring, make it dear."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import RegardError


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits - 1 symmetric levels, a scale for each output channel: w (out, in)."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    return (weight / scale).round().clamp(-top, top) * scale


def quantised(model: nn.Module, bits: int) -> nn.Module:
    """A copy of a model whose linear layers have weights of `bits` bits (2 to 16), rounded after training."""
    if not 2 <= bits <= 16:
        raise RegardError(f"bits={bits}; expected 2 to 16")
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        for module in smaller.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, bits))
    return smaller
