"""Gates on maps (B, C, H, W): squeeze, a small net, a gate over channels, rows and columns or pixels, multiply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RegardError
from ..parts import takes
from .planes import BatchNorm

POOLS = ("avg", "max", "lp", "lse")


def pooled(x: Tensor, kind: str, dim: int) -> Tensor:
    """x over one dimension, which stays with size 1: kind "avg", "max" (the first of equals takes the gradient), "lp" (the root of the sum
    of squares) or "lse" (log of the sum of exponentials)."""
    if kind == "avg":
        return x.mean(dim, keepdim=True)
    if kind == "max":  # the places of the largest, which its gradient needs, take most of the time
        return x.max(dim, keepdim=True).values if x.requires_grad and torch.is_grad_enabled() else x.amax(dim, keepdim=True)
    if kind == "lp":
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return torch.logsumexp(x, dim, keepdim=True)


def known_pools(pools: Sequence[str]) -> tuple[str, ...]:
    if not pools or any(pool not in POOLS for pool in pools):
        raise RegardError(f"pools={tuple(pools)}; expected one or more of {', '.join(map(repr, POOLS))}")
    return tuple(pools)


def narrowed(channels: int, reduction: int) -> int:
    """channels // reduction, at least 1."""
    if reduction < 1 or channels // reduction < 1:
        raise RegardError(f"reduction={reduction} leaves no channel of channels={channels}; expected between 1 and {channels}")
    return channels // reduction


def multiplied_again(product: Tensor, gate: Tensor) -> Tensor:
    """A product that nobody else holds, times a gate: in place where no gradient is kept."""
    fits = not torch.is_grad_enabled() and torch.result_type(product, gate) == product.dtype
    return product.mul_(gate) if fits else product * gate


def multiplied(x: Tensor, first: Tensor, *gates: Tensor) -> Tensor:
    """x times each gate in turn: no product of gates is ever as large as x."""
    y = x * first
    for gate in gates:
        y = multiplied_again(y, gate)
    return y


def over_plane(weights: Tensor, x: Tensor) -> Tensor:
    """A 1 x 1 convolution to one channel: weights (C) or (B, C), x (B, C, H, W) -> (B, 1, H, W)."""
    return (weights.unsqueeze(-2) @ x.flatten(2)).unflatten(2, x.shape[2:])


class PlaneGate(nn.Module):
    """A layer x (B, C, H, W) -> x * gate(x). Those that need one width have it as `channels`."""

    channels: Any

    def gate(self, x: Tensor) -> Tensor:
        """A factor that broadcasts to x."""
        raise NotImplementedError

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class ChannelGate(PlaneGate):
    """sigmoid(sum over pools of MLP(pool(x))), one factor a channel (B, C, 1, 1); MLP: C -> C // reduction -> C with ReLU and biases.

    pools: any of "avg", "max", "lp", "lse" over the plane; one MLP for all. Squeeze-and-excitation is pools=("avg",).
    """

    def __init__(self, channels: int, reduction: int = 16, pools: Sequence[str] = ("avg", "max")):
        super().__init__()
        hidden = narrowed(channels, reduction)
        self.channels, self.pools = channels, known_pools(pools)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def gate(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        logits = torch.stack([self.mlp(pooled(flat, pool, 2)[..., 0]) for pool in self.pools]).sum(0)
        return torch.sigmoid(logits)[..., None, None]


class SpatialGate(PlaneGate):
    """sigmoid(BN(conv(pools of x over its channels))), one factor a pixel (B, 1, H, W); the convolution has no bias.

    pools: any of "max", "avg", "lp", "lse" over the channels, side by side. norm: BatchNorm (eps, momentum), which the released code has
    and the paper's formula leaves out.
    """

    channels = None

    def __init__(
        self,
        kernel: int = 7,
        pools: Sequence[str] = ("max", "avg"),
        norm: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.01,
    ):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise RegardError(f"kernel={kernel}; expected an odd number")
        self.pools = known_pools(pools)
        self.conv = nn.Conv2d(len(self.pools), 1, kernel, padding=kernel // 2, bias=False)
        self.norm = BatchNorm(1, eps, momentum) if norm else nn.Identity()

    def gate(self, x: Tensor) -> Tensor:
        squeezed = torch.cat([pooled(x, pool, 1) for pool in self.pools], 1)
        return torch.sigmoid(self.norm(self.conv(squeezed)))


class StripGate(PlaneGate):
    """A factor a row times a factor a column: `strips(x)` gives (B, C, H, 1) and (B, C, 1, W)."""

    def strips(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def gate(self, x: Tensor) -> Tensor:
        rows, columns = self.strips(x)
        return rows * columns

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        return multiplied(x, *self.strips(x))
