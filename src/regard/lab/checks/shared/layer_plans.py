"""The cost of a plan over layers, and a small decoder to plan for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.nn.decoder import Decoder


def cost_of(modes: tuple[bool, ...], error: Tensor, weight: float, forced: Tensor) -> float:
    """The cost of a vector of full layers (True), or inf where a forced layer is not full."""
    total, last = 0.0, 0
    for n, full in enumerate(modes):
        last = n if full else last
        total += weight if full else float(error[last, n]) + weight * 0.1
    return total if all(full or not f for full, f in zip(modes, forced.tolist(), strict=True)) else math.inf


def small(layers: int = 4) -> Decoder:
    model = Decoder("softmax", vocab=40, dim=32, layers=layers, heads=4, kv_heads=2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model
