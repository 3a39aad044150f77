"""Agent attention: a few agent tokens gather from the keys and spread to the queries (id 174; Han et al., 2023).

o = softmax(s Q A^T + B2) softmax(s A K^T + B1) V,   A = pooled queries;   rank <= number of agents
AgentSD: `agent_sd(unet)`, agents being merged tokens, without training.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Input, Modified, Relayed, Weighted
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.images.planes import StridedTokens, grid_of, query_and_rest, sequence_of

if TYPE_CHECKING:
    from regard.adapt.merged import MergedAttention


def biased(s: Tensor, bias: Tensor) -> Tensor:
    return s + bias


@register("agent-attention")
def agent(agents: int = 49) -> Relayed:
    """agents: how many tokens q is pooled to when the input `agents` (B, H, m, D) is not given. Inputs `gather_bias` (H, m, Lk)
    and `spread_bias` (H, Lq, m) default to 0. The vision module with 2-D pooling, biases and convolution: `regard.nn.AgentAttention`."""
    call = Weighted(position=Modified(biased, (Input("bias", "hqk", default=0.0),)))
    return Relayed(call, call, agents)


def agent_attention(q: Tensor, a: Tensor, k: Tensor, v: Tensor, *, spread_power: float = 1.0, shortcut: float = 0.0) -> Tensor:
    """The functional form on given agents a (B, H, m, D): softmax(s^power Q A^T) softmax(s A K^T) V + shortcut * V, s = D^-1/2.

    AgentSD, the training-free adaptor for diffusion models, uses spread_power = 0.3 and shortcut = 0.075 (then Lq = Lk).
    """
    s = q.shape[-1] ** -0.5
    out = attend(q, a, attend(a, k, v, "softmax"), "softmax", scale=s**spread_power)
    return out + shortcut * v if shortcut else out


def agent_sd(
    unet: nn.Module,
    ratio: float = 0.5,
    agent_ratio: float = 0.8,
    spread_power: float = 0.3,
    shortcut: float = 0.075,
    **options: Any,
) -> MergedAttention:
    """AgentSD in a diffusers UNet, until `.restore()` or the end of a `with` block. options: of `regard.adapt.merged.MergedAttention`.

    Queries, keys and values are those of merged tokens (ratio), agents the queries of tokens merged further (agent_ratio), where they are fewer than
    half of the merged ones; otherwise the merged tokens attend plainly. With the defaults a map of even sides keeps half of its tokens and makes a
    quarter into agents, which are not fewer: as released, ratio=0.4 or below is where agents work.
    """

    from regard.adapt.merged import MergedAttention  # which brings the hosts

    def read(q: Tensor, agents: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        if agents is None:
            return attend(q, k, v, "softmax")
        return agent_attention(q, agents, k, v, spread_power=spread_power, shortcut=shortcut)

    return MergedAttention(unet, read, ratio, agent_ratio, **options)


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
