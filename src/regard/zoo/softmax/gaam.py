"""Gaussian adaptive attention: features or frames weighted by learned Gaussians around their mean (id 114; Ioannides et al., 2024).

w = prod_g N((x - (mu + delta_g)) / sigma; 0, c_g^2),  w <- w / sum w,  y = x w        a head is a chunk of the axis
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError


@register("gaam", kind="module")
class GaussianAdaptiveAttention(nn.Module):
    """x, any shape -> x * weights of the same shape (and the weights). axis: features (-1) or time, cut into `heads` chunks, the last of
    which takes the remainder. gaussians: G a head; their offsets `delta` (H, G) start at 0, widths `c` (H, G) at exp(N(0, 1)).

    padding_value: entries of x equal to it count as 0 in the statistics, weigh in the sum by what they are, and pass unchanged, as released
    (so the weights of the others sum to less than one); None: there is none. running: statistics over
    the axis up to each entry (causal, for axis = time); weights are then divided by their running sum.
    """

    def __init__(
        self,
        axis: int = -1,
        heads: int = 4,
        gaussians: int = 3,
        padding_value: float | None = None,
        eps: float = 1e-8,
        running: bool = False,
    ):
        super().__init__()
        if heads < 1 or gaussians < 1:
            raise RegardError(f"heads={heads}, gaussians={gaussians}: expected positive integers")
        self.axis, self.heads, self.padding_value, self.eps, self.running = axis, heads, padding_value, eps, running
        self.delta, self.c = nn.Parameter(torch.zeros(heads, gaussians)), nn.Parameter(torch.randn(heads, gaussians).exp())

    def chunk(self, x: Tensor, known: Tensor, head: int) -> Tensor:
        """Weights of one head's chunk (..., n), the axis last: of x, around the statistics of `known`, x with padding as 0."""
        n = x.shape[-1]
        if self.running:
            count = torch.arange(1, n + 1, device=x.device, dtype=x.dtype)
            mean = known.cumsum(-1) / count
            spread = ((known.square().cumsum(-1) - count * mean.square()) / (count - 1).clamp_min(1)).clamp_min(0) + self.eps
        else:
            mean = known.mean(-1, keepdim=True)
            spread = (known - mean).square().sum(-1, keepdim=True) / max(1, n - 1) + self.eps
        log = torch.zeros_like(x)
        for delta, c in zip(self.delta[head], self.c[head], strict=True):
            width = torch.where(c.abs() < 1e-3, 1e-3, c.abs()).to(x.dtype)
            z = (x - (mean + delta)) / spread.sqrt()
            log = log - z.square() / (2 * width.square()) - 0.5 * math.log(2 * math.pi) - width.log()
        w = torch.exp(log)
        return w / (w.cumsum(-1) if self.running else w.sum(-1, keepdim=True)).clamp_min(self.eps)

    def forward(self, x: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        turned = x.movedim(self.axis, -1)
        size = turned.shape[-1] // self.heads
        if size < 1:
            raise RegardError(f"axis {self.axis} has {turned.shape[-1]} entries; expected at least heads={self.heads}")
        padding = None if self.padding_value is None else turned == self.padding_value
        known = turned if padding is None else turned.masked_fill(padding, 0.0)
        bounds = [*range(0, size * self.heads, size), turned.shape[-1]]
        weights = torch.cat([self.chunk(turned[..., a:b], known[..., a:b], h) for h, (a, b) in enumerate(itertools.pairwise(bounds))], -1)
        y = turned * weights if padding is None else torch.where(padding, turned, turned * weights)
        y, weights = y.movedim(-1, self.axis), weights.movedim(-1, self.axis)
        return (y, weights) if return_weights else y


class GaussianBlock(nn.Module):
    """x + attention(x), once for each of `layers` attentions over the same axis."""

    def __init__(self, axis: int = -1, heads: int = 4, gaussians: int = 3, layers: int = 1, padding_value: float | None = None):
        super().__init__()
        self.layers = nn.ModuleList([GaussianAdaptiveAttention(axis, heads, gaussians, padding_value) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def importance_factor(weights: Tensor) -> Tensor:
    """(n,) in [0, 1] from weights (..., n): their average over data, its least entry moved to 0 and its greatest to 1."""
    mean = weights.detach().flatten(0, -2).mean(0)
    span = mean.max() - mean.min()
    return (mean - mean.min()) / torch.where(span > 0, span, 1.0)
