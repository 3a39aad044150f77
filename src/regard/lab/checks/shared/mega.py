"""The damped moving average, a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.nn.ema import MultiHeadEMA


def ema_loop(layer: MultiHeadEMA, x: Tensor, way: int = 0) -> Tensor:
    p, a = torch.sigmoid(layer.delta[way]), torch.sigmoid(layer.alpha[way])
    h, outs = torch.zeros(*x.shape[::2], layer.ndim, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = p * layer.beta[way] * x[:, t, :, None] + (1 - p * a) * h
        outs.append((layer.gamma[way] * h).sum(-1) / layer.ndim**0.5)
    return torch.stack(outs, 1)
