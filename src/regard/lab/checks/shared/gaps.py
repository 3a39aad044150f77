"""Largest gaps of values and gradients between what was computed and a truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.lab import naive


def gaps(found: Tensor, truth: Tensor, inputs: Sequence[Tensor]) -> float:
    """Of the values, and of the gradients that a drawn weighing of them gives the inputs."""
    w = torch.randn_like(found)
    grads = [torch.autograd.grad((out * w).sum(), inputs, retain_graph=True) for out in (found, truth)]
    return max(naive.gap(found, truth), *(naive.gap(a, b) for a, b in zip(*grads, strict=True)))


__all__ = ["gaps"]
