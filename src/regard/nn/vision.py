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


class StridedTokens(nn.Module):
    """Tokens of a grid, x (B, H*W, dim) -> (B, H*W / ratio^2, dim): a convolution of stride `ratio`, then LayerNorm (PVT's reduction)."""

    def __init__(self, dim: int, shape: tuple[int, int], ratio: int):
        super().__init__()
        if shape[0] % ratio or shape[1] % ratio:
            raise RegardError(f"sr_ratio={ratio}: expected a divisor of both sides of the grid {shape}")
        self.shape, self.conv, self.norm = shape, nn.Conv2d(dim, dim, ratio, ratio), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.transpose(1, 2).unflatten(-1, self.shape)).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


def query_and_rest(qkv: nn.Linear, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q of x, and k and v of `source`, by one projection with three parts."""
    dim, bias = x.shape[-1], qkv.bias
    q = F.linear(x, qkv.weight[:dim], None if bias is None else bias[:dim])
    k, v = F.linear(source, qkv.weight[dim:], None if bias is None else bias[dim:]).chunk(2, -1)
    return q, k, v


class AgentAttention(nn.Module):
    """Agent attention with 2-D pooled agents, factorised position biases and a depthwise convolution on v (Han et al., 2023).

    shape: the grid (H, W); agents: a square number. bias: whether the learned position biases are used; cls: a class token stands first,
    which takes no part in pooling and convolution. sr_ratio: above 1, keys and values are read off the grid through a convolution of that
    stride and a LayerNorm, and v is stretched back before its convolution (no class token). qkv_bias: of the projections.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: tuple[int, int],
        agents: int = 49,
        bias: bool = True,
        cls: bool = False,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.side = math.isqrt(agents)
        if self.side**2 != agents:
            raise RegardError(f"agents={agents}: expected a square number (agents are pooled to a square)")
        if sr_ratio > 1 and cls:
            raise RegardError(f"sr_ratio={sr_ratio}: keys are read off the grid, which a class token is not on; expected cls=False")
        self.heads, self.shape, self.cls, self.sr_ratio = heads, shape, int(cls), sr_ratio
        self.small = (shape[0] // sr_ratio, shape[1] // sr_ratio)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, qkv_bias), nn.Linear(dim, dim)
        self.reduce = StridedTokens(dim, shape, sr_ratio) if sr_ratio > 1 else None
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mechanism = get("agent-attention", agents=agents)
        self.has_bias = bias
        for side, (rows, columns) in (("gather", self.small), ("spread", shape)) if bias else ():
            for name, size in (
                ("grid", (heads, agents, 7, 7)),
                ("row", (heads, agents, rows, 1)),
                ("column", (heads, agents, 1, columns)),
                ("cls", (heads, agents, 1)),
            ):
                self.register_parameter(f"{side}_{name}", nn.Parameter(nn.init.trunc_normal_(torch.empty(size), std=0.02)))

    def biases(self, side: str) -> Tensor:
        """(heads, agents, tokens): an upsampled 7 x 7 map plus a row and a column part, and the class token's column."""
        part = {name: getattr(self, f"{side}_{name}") for name in ("grid", "row", "column", "cls")}
        size = self.small if side == "gather" else self.shape
        plane = F.interpolate(part["grid"], size=size, mode="bilinear") + part["row"] + part["column"]
        return torch.cat((part["cls"], plane.flatten(2)), -1) if self.cls else plane.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        if n != self.shape[0] * self.shape[1] + self.cls:
            raise RegardError(f"x has {n} tokens; expected {self.shape[0]} x {self.shape[1]}{' + 1' if self.cls else ''}")
        flat = self.qkv(x).chunk(3, -1) if self.reduce is None else query_and_rest(self.qkv, x, self.reduce(x))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in flat)
        agents = sequence_of(F.adaptive_avg_pool2d(grid_of(q[..., self.cls :, :], self.shape), self.side), b)
        inputs: dict[str, Any] = (
            {"gather_bias": self.biases("gather"), "spread_bias": self.biases("spread").transpose(1, 2)} if self.has_bias else {}
        )
        out = attend(q, k, v, self.mechanism, agents=agents, **inputs).transpose(1, 2).flatten(-2)
        plane = flat[2][:, self.cls :].transpose(1, 2).unflatten(-1, self.small)
        plane = plane if self.sr_ratio == 1 else F.interpolate(plane, size=self.shape, mode="bilinear")
        local = F.pad(self.conv(plane).flatten(2).transpose(1, 2), (0, 0, self.cls, 0))
        return self.out(out + local)  # type: ignore[no-any-return]


class SoftmaxFreeAttention(nn.Module):
    """SOFT: shared queries and keys, a Gaussian kernel, landmarks by a strided convolution over the grid (Lu et al., 2022).

    ratio: stride of the landmark convolution. mode: how A is inverted, see "soft" ("newton", "symmetric" of SOFT++, "exact"). pool:
    average-pool landmarks instead of the convolution. conv: width of a depthwise convolution on v, added to the output (True: 3). conv_bias:
    of both convolutions; the released ones have none, and one kernel a head for v. Landmarks are made from q D^-1/4 as it stands in the
    kernel.
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
        conv: bool | int = False,
        mode: str | None = None,
        conv_bias: bool = True,
    ):
        super().__init__()
        head_dim = dim // heads
        self.heads, self.shape, self.ratio = heads, shape, ratio
        self.q, self.v, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.landmark = None if pool else nn.Conv2d(head_dim, head_dim, ratio, ratio, bias=conv_bias)
        self.norm = None if pool else nn.LayerNorm(head_dim)
        width = 3 if conv is True else int(conv)
        self.conv = nn.Conv2d(dim, dim, width, padding=width // 2, groups=dim, bias=conv_bias) if conv else None
        self.mechanism = get("soft", iterations=iterations, symmetric=symmetric, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        if n != self.shape[0] * self.shape[1]:
            raise RegardError(f"x has {n} tokens; expected {self.shape[0]} x {self.shape[1]}")
        q, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.v(x)))
        q = q * q.shape[-1] ** -0.25
        plane = grid_of(q, self.shape)
        if self.landmark is None:
            marks = sequence_of(F.avg_pool2d(plane, self.ratio), b)
        else:
            assert self.norm is not None
            marks = F.gelu(self.norm(sequence_of(self.landmark(plane), b)))
        out = attend(q, q, v, self.mechanism, landmarks=marks, scale=1.0).transpose(1, 2).flatten(-2)
        if self.conv is not None:
            local = self.conv(v.transpose(1, 2).flatten(-2).transpose(1, 2).unflatten(-1, self.shape))
            out = out + local.flatten(2).transpose(1, 2)
        return self.out(out)  # type: ignore[no-any-return]
