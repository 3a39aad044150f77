"""A multi-dimensional damped exponential moving average (Ma et al., 2022)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError


class MultiHeadEMA(nn.Module):
    """x (B, N, dim) -> silu(EMA(x) + omega x), each channel expanded to `ndim` damped averages; by FFT in `forward`, one token at a time
    in `step`, whose state is h (B, dim, ndim). bidirectional: another set of averages runs backwards; both count x_t. truncation: tokens
    that an average reaches back (None: all)."""

    def __init__(self, dim: int, ndim: int = 16, bidirectional: bool = False, activation: bool = True, truncation: int | None = None):
        super().__init__()
        ways = 2 if bidirectional else 1
        self.bidirectional, self.ndim, self.activation, self.truncation = bidirectional, ndim, activation, truncation
        self.delta, self.alpha = (nn.Parameter(0.2 * torch.randn(ways, dim, ndim)) for _ in range(2))
        signs = (-1.0) ** torch.arange(ndim)
        self.beta = nn.Parameter(signs + 0.02 * torch.randn(ways, dim, ndim))
        self.gamma = nn.Parameter(torch.randn(ways, dim, ndim))
        self.omega = nn.Parameter(torch.randn(dim))

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q, p beta, gamma / sqrt(n)), (ways, dim, ndim)."""
        p = torch.sigmoid(self.delta)
        return 1 - p * torch.sigmoid(self.alpha), p * self.beta, self.gamma / math.sqrt(self.ndim)

    def kernel(self, length: int) -> Tensor:
        """(ways, dim, length): what x_t adds to y_{t + l}."""
        q, write, read = self.coefficients()
        reach = length if self.truncation is None else min(length, self.truncation)
        powers = torch.exp(torch.arange(reach, device=q.device, dtype=q.dtype) * q.log()[..., None])
        return torch.einsum("wdn,wdnl->wdl", write * read, powers)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, N) bool: what is no padding, which no average counts."""
        n, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)  # there are no half-precision transforms on a CPU
        spectrum = torch.fft.rfft(self.kernel(n).to(wide), n=2 * n)
        counted = (x if keep is None else torch.where(keep[..., None], x, 0.0)).to(wide)
        signal = torch.fft.rfft(counted.transpose(1, 2), n=2 * n)
        y = torch.fft.irfft(signal * spectrum[0], n=2 * n)[..., :n]
        if self.bidirectional:
            back = torch.fft.rfft(counted.flip(1).transpose(1, 2), n=2 * n)
            y = y + torch.fft.irfft(back * spectrum[1], n=2 * n)[..., :n].flip(-1)
        return self.close(y.transpose(1, 2).to(x.dtype), x)

    def close(self, y: Tensor, x: Tensor) -> Tensor:
        y = y + self.omega * x
        return F.silu(y) if self.activation else y

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """New tokens (B, n, dim) after those in `state`."""
        if self.bidirectional or self.truncation is not None:
            raise RegardError("step needs bidirectional=False and truncation=None: its state is a sum over all earlier tokens")
        q, write, read = (c[0] for c in self.coefficients())
        state = x.new_zeros(*x.shape[::2], self.ndim) if state is None else state
        outs = []
        for t in range(x.shape[1]):
            state = write * x[:, t, :, None] + q * state
            outs.append((read * state).sum(-1))
        return self.close(torch.stack(outs, 1), x), state
