"""Attention layers for images on a grid: agent attention and softmax-free attention, x (B, H*W, dim) -> (B, H*W, dim)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import get
from ..engine import attend
from ..errors import RegardError


def grid_of(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, heads, H*W, D) -> (B * heads, D, H, W)."""
    return x.flatten(0, 1).transpose(1, 2).unflatten(-1, shape)


def sequence_of(x: Tensor, batch: int) -> Tensor:
    """The inverse of `grid_of`."""
    return x.flatten(2).transpose(1, 2).unflatten(0, (batch, -1))


class AgentAttention(nn.Module):
    """Agent attention with 2-D pooled agents, factorised position biases and a depthwise convolution on v (Han et al., 2023).

    shape: the grid (H, W); agents: a square number. bias: whether the learned position biases are used; cls: a class token stands first,
    which takes no part in pooling and convolution.
    """

    def __init__(self, dim: int, heads: int, shape: tuple[int, int], agents: int = 49, bias: bool = True, cls: bool = False):
        super().__init__()
        self.side = math.isqrt(agents)
        if self.side**2 != agents:
            raise RegardError(f"agents={agents}: expected a square number (agents are pooled to a square)")
        self.heads, self.shape, self.cls = heads, shape, int(cls)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mechanism = get("agent-attention", agents=agents)
        self.has_bias = bias
        for side in ("gather", "spread") if bias else ():
            for name, size in (
                ("grid", (heads, agents, 7, 7)),
                ("row", (heads, agents, shape[0], 1)),
                ("column", (heads, agents, 1, shape[1])),
                ("cls", (heads, agents, 1)),
            ):
                self.register_parameter(f"{side}_{name}", nn.Parameter(nn.init.trunc_normal_(torch.empty(size), std=0.02)))

    def biases(self, side: str) -> Tensor:
        """(heads, agents, tokens): an upsampled 7 x 7 map plus a row and a column part, and the class token's column."""
        part = {name: getattr(self, f"{side}_{name}") for name in ("grid", "row", "column", "cls")}
        plane = F.interpolate(part["grid"], size=self.shape, mode="bilinear") + part["row"] + part["column"]
        return torch.cat((part["cls"], plane.flatten(2)), -1) if self.cls else plane.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        if n != self.shape[0] * self.shape[1] + self.cls:
            raise RegardError(f"x has {n} tokens; expected {self.shape[0]} x {self.shape[1]}{' + 1' if self.cls else ''}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        agents = sequence_of(F.adaptive_avg_pool2d(grid_of(q[..., self.cls :, :], self.shape), self.side), b)
        inputs: dict[str, Any] = (
            {"gather_bias": self.biases("gather"), "spread_bias": self.biases("spread").transpose(1, 2)} if self.has_bias else {}
        )
        out = attend(q, k, v, self.mechanism, agents=agents, **inputs).transpose(1, 2).flatten(-2)
        plane = v.transpose(1, 2).flatten(-2)[:, self.cls :].transpose(1, 2).unflatten(-1, self.shape)
        local = F.pad(self.conv(plane).flatten(2).transpose(1, 2), (0, 0, self.cls, 0))
        return self.out(out + local)  # type: ignore[no-any-return]


class SoftmaxFreeAttention(nn.Module):
    """SOFT: shared queries and keys, a Gaussian kernel, landmarks by a strided convolution over the grid (Lu et al., 2022).

    ratio: stride of the landmark convolution. symmetric: SOFT++'s normalisation. pool: average-pool landmarks instead of the convolution.
    conv: a depthwise convolution on v, added to the output.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: tuple[int, int],
        ratio: int = 2,
        iterations: int = 20,
        symmetric: bool = False,
        pool: bool = False,
        conv: bool = False,
    ):
        super().__init__()
        head_dim = dim // heads
        self.heads, self.shape, self.ratio = heads, shape, ratio
        self.q, self.v, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.landmark = None if pool else nn.Conv2d(head_dim, head_dim, ratio, ratio)
        self.norm = None if pool else nn.LayerNorm(head_dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if conv else None
        self.mechanism = get("soft", iterations=iterations, symmetric=symmetric)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        if n != self.shape[0] * self.shape[1]:
            raise RegardError(f"x has {n} tokens; expected {self.shape[0]} x {self.shape[1]}")
        q, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.v(x)))
        plane = grid_of(q, self.shape)
        if self.landmark is None:
            marks = sequence_of(F.avg_pool2d(plane, self.ratio), b)
        else:
            assert self.norm is not None
            marks = F.gelu(self.norm(sequence_of(self.landmark(plane), b)))
        out = attend(q, q, v, self.mechanism, landmarks=marks).transpose(1, 2).flatten(-2)
        if self.conv is not None:
            local = self.conv(v.transpose(1, 2).flatten(-2).transpose(1, 2).unflatten(-1, self.shape))
            out = out + local.flatten(2).transpose(1, 2)
        return self.out(out)  # type: ignore[no-any-return]
