"""Windows on grids as masks, dense attention under them, and the settings to try."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab.checks.shared.neighborhood import brute

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
