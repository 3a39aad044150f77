"""Selective state spaces (Mamba's) over the engine's recurrence: the scan, and the layer that reads its step sizes from the input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Causal, Recurrent
from ..engine.door import attend

SCAN = Recurrent(decay="channel", scaled=False)


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
    """h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t,  y_t = c_t . h_t + skip x_t.

    x, delta (B, C, L), a (C, n) < 0, b and c (B, n, L) or (B, C, n, L), skip (C,) -> y (B, C, L). Runs chunkwise.
    """
    wide = (*x.shape[:2], -1, -1)
    k, q = ((y if y.dim() == 4 else y[:, None]).mT.expand(*wide) for y in (b, c))
    y = attend(q, k, (delta * x)[..., None], SCAN, mask=Causal(), log_decay=delta[..., None] * a[:, None])[..., 0]
    return y if skip is None else y + skip[:, None] * x


class SelectiveScan(nn.Module):
    """x (B, ways, C, L) -> the same shape: Mamba's state space a way and channel, with
    delta = softplus(W_dt W_x x + bias), B, C = W_x x, A = -exp(log_a), D = skip.

    state: n. rank: of delta (None: C / 16 rounded up). First values as Mamba's: A = -(1..n), D = 1, W_dt uniform within rank^-1/2, and the bias
    such that delta starts log-uniform in [low, high], at least `floor`.
    """

    def __init__(
        self,
        channels: int,
        ways: int = 1,
        state: int = 16,
        rank: int | None = None,
        low: float = 1e-3,
        high: float = 0.1,
        floor: float = 1e-4,
    ):
        super().__init__()
        rank = math.ceil(channels / 16) if rank is None else rank
        self.sizes = [rank, state, state]
        self.read = nn.Parameter(torch.empty(ways, rank + 2 * state, channels).uniform_(-1, 1) * channels**-0.5)
        self.step = nn.Parameter(torch.empty(ways, channels, rank).uniform_(-1, 1) * rank**-0.5)
        start = torch.exp(torch.rand(ways, channels) * (math.log(high) - math.log(low)) + math.log(low)).clamp_min(floor)
        self.bias = nn.Parameter(start + torch.log(-torch.expm1(-start)))
        self.log_a = nn.Parameter(torch.log(torch.arange(1, state + 1.0)).repeat(ways, channels, 1))
        self.skip = nn.Parameter(torch.ones(ways, channels))

    def forward(self, x: Tensor) -> Tensor:
        low, b, c = torch.einsum("kdc,bkcl->bkdl", self.read, x).split(self.sizes, 2)
        delta = F.softplus(torch.einsum("kcr,bkrl->bkcl", self.step, low) + self.bias[..., None])
        per = [y[:, :, None].expand(-1, -1, x.shape[2], -1, -1).flatten(1, 2) for y in (b, c)]
        a = -torch.exp(self.log_a.to(torch.promote_types(self.log_a.dtype, torch.float32))).flatten(0, 1)
        y = selective_scan(x.flatten(1, 2), delta.flatten(1, 2), a.to(x.dtype), per[0], per[1], self.skip.flatten())
        return y.unflatten(1, x.shape[1:3])
