"""Selective state spaces (Mamba's): the scan, the layer that reads its step sizes from the input, and the four orders of a map."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Causal, Recurrent
from ..engine.door import attend
from ..errors import RegardError

SCAN = Recurrent(decay="channel", scaled=False)


HOW = ("auto", "steps", "chunks")


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None, how: str = "auto") -> Tensor:
    """h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t,  y_t = c_t . h_t + skip x_t.

    x, delta (B, C, L), a (C, n) < 0, b and c (B, n, L) or (B, C, n, L), skip (C,) -> y (B, C, L). how: "steps" goes token by token, "chunks" is
    the engine's chunkwise scan; "auto": steps on a CPU, where they take a quarter of the time, chunks elsewhere.
    """
    if how not in HOW:
        raise RegardError(f"how={how!r}; expected one of {', '.join(map(repr, HOW))}")
    b, c = (y if y.dim() == 4 else y[:, None] for y in (b, c))
    if how == "steps" or (how == "auto" and x.device.type == "cpu"):
        y = stepwise(x, delta, a, b, c)
    else:
        k, q = (y.mT.expand(*x.shape[:2], -1, -1) for y in (b, c))
        y = attend(q, k, (delta * x)[..., None], SCAN, mask=Causal(), log_decay=delta[..., None] * a[:, None])[..., 0]
    return y if skip is None else y + skip[:, None] * x


def stepwise(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan in float32 at least, a token after the other."""
    if not x.shape[2]:
        return torch.zeros_like(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    rate, heard = delta.to(wide)[:, :, None], (delta * x).to(wide)[:, :, None] * b
    h, states = torch.zeros_like(heard[..., 0]), []
    for kept, new in zip(torch.exp(rate * a.to(wide)[..., None]).unbind(-1), heard.unbind(-1), strict=True):
        h = torch.addcmul(new, kept, h)
        states.append(h)
    return (torch.stack(states, -1) * c).sum(2).to(x.dtype)


class SelectiveScan(nn.Module):
    """x (B, ways, C, L) -> the same shape: Mamba's state space a way and channel, with
    delta = softplus(W_dt W_x x + bias), B, C = W_x x, A = -exp(log_a), D = skip.

    state: n. rank: of delta (None: C / 16 rounded up). First values as Mamba's: A = -(1..n), D = 1, W_dt uniform within rank^-1/2, and the bias
    such that delta starts log-uniform in [low, high], at least `floor`. how: as in `selective_scan`.
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
        how: str = "auto",
    ):
        super().__init__()
        rank = math.ceil(channels / 16) if rank is None else rank
        self.sizes, self.how = [rank, state, state], how
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
        y = selective_scan(x.flatten(1, 2), delta.flatten(1, 2), a.to(x.dtype), per[0], per[1], self.skip.flatten(), self.how)
        return y.unflatten(1, x.shape[1:3])


def cross_scan(x: Tensor) -> Tensor:
    """A map (B, C, H, W) in four orders (B, 4, C, H W): by rows, by columns, and both from the end."""
    two = torch.stack((x.flatten(2), x.mT.flatten(2)), 1)
    return torch.cat((two, two.flip(-1)), 1)


def cross_merge(y: Tensor, shape: tuple[int, int]) -> Tensor:
    """Four orders (B, 4, C, H W) back on the map and added up (B, C, H, W); cross_merge(cross_scan(x)) = 4 x."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rows.unflatten(-1, shape) + columns.unflatten(-1, shape[::-1]).mT
