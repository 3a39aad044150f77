"""Checks of agent-attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.reduced import eye, qkv
from regard.lab.verification import check
from regard.zoo.linear.agent_attention import AgentAttention, agent_attention


@check(
    "agent-attention",
    "two calls == softmax(s Q A^T + B2) softmax(s A K^T + B1) V, A pooled from Q",
    below=1e-12,
    control="agents pooled from K",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(50)
    b1, b2 = torch.randn(2, 9, 50, dtype=F64), torch.randn(2, 50, 9, dtype=F64)

    def explicit(x: Tensor) -> Tensor:
        # pooled by hand: agent a averages tokens floor(a n / m) .. ceil((a + 1) n / m)
        cells = [x[:, :, a * 50 // 9 : -(-(a + 1) * 50 // 9)].mean(2) for a in range(9)]
        a = torch.stack(cells, 2)
        spread = (q @ a.transpose(-1, -2) / math.sqrt(8) + b2).softmax(-1)
        return spread @ (a @ k.transpose(-1, -2) / math.sqrt(8) + b1).softmax(-1) @ v

    out = attend(q, k, v, get("agent-attention", agents=9), gather_bias=b1, spread_bias=b2)
    return naive.gap(out, explicit(q)), naive.gap(out, explicit(k))


@check("agent-attention", "the implied matrix has rank n = 9 at N = 50, and rows that sum to one", below=9.0, control="softmax's matrix")
def _() -> tuple[float, float]:
    q, k, _ = qkv(50)
    implied = attend(q, k, eye(50), get("agent-attention", agents=9))
    sums = naive.gap(implied.sum(-1), torch.ones(1, 2, 50, dtype=F64))
    rank = float(torch.linalg.matrix_rank(implied, rtol=1e-10).max())
    return rank if sums < 1e-12 else math.inf, float(torch.linalg.matrix_rank(attend(q, k, eye(50), "softmax"), rtol=1e-10).max())


@check("agent-attention", "N agents at separated tokens give back softmax attention", below=1e-6, control="9 agents")
def _() -> tuple[float, float]:
    q, k, v = qkv(32, 32)
    q = 40 * torch.linalg.qr(q)[0]  # separated tokens: softmax(Q A^T) is then the identity
    truth = attend(q, k, v, "softmax")
    full = agent_attention(q, q, k, v)
    return naive.gap(full, truth), naive.gap(attend(q, k, v, get("agent-attention", agents=9)), truth)


def upsampled(small: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bilinear interpolation written out: cell centres map to cell centres, edges repeat."""
    out = small.new_zeros(*small.shape[:2], *shape)
    for y in range(shape[0]):
        for x in range(shape[1]):
            at = [min(max((c + 0.5) * s / n - 0.5, 0.0), s - 1.0) for c, n, s in zip((y, x), shape, small.shape[2:], strict=True)]
            (top, left), (dy, dx) = [int(c) for c in at], [c - int(c) for c in at]
            low, right = min(top + 1, small.shape[2] - 1), min(left + 1, small.shape[3] - 1)
            above = (1 - dx) * small[:, :, top, left] + dx * small[:, :, top, right]
            below = (1 - dx) * small[:, :, low, left] + dx * small[:, :, low, right]
            out[:, :, y, x] = (1 - dy) * above + dy * below
    return out


def bias_by_hand(layer: AgentAttention, side: str) -> Tensor:
    part = {name: getattr(layer, f"{side}_{name}") for name in ("grid", "row", "column", "cls")}
    return torch.cat((part["cls"], (upsampled(part["grid"], layer.shape) + part["row"] + part["column"]).flatten(2)), -1)


def agent_layer(layer: AgentAttention, x: Tensor, pool: Callable[[Tensor], Tensor], biased: bool) -> Tensor:
    """The layer's formula by hand, with agents pooled by `pool` from queries (B, heads, H*W, D)."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    a, scale = pool(q[:, :, layer.cls :]), q.shape[-1] ** -0.5
    none = torch.zeros(1, dtype=x.dtype)
    gather, spread = (bias_by_hand(layer, "gather"), bias_by_hand(layer, "spread").transpose(1, 2)) if biased else (none, none)
    out = (q @ a.transpose(-1, -2) * scale + spread).softmax(-1) @ (a @ k.transpose(-1, -2) * scale + gather).softmax(-1) @ v
    plane = v.transpose(1, 2).flatten(-2)[:, layer.cls :].transpose(1, 2).unflatten(-1, layer.shape)
    local = F.pad(layer.conv(plane).flatten(2).transpose(1, 2), (0, 0, layer.cls, 0))
    return layer.out(out.transpose(1, 2).flatten(-2) + local)  # type: ignore[no-any-return]


@check(
    "agent-attention",
    "the layer pools on its grid: on a 9 x 6 image constant in 3 x 2 cells its agents are the cells' queries",
    below=1e-10,
    control="agents pooled along the sequence",
)
def _() -> tuple[float, float]:
    layer = AgentAttention(16, 2, (9, 6), agents=9, bias=False).double()
    x = torch.randn(1, 3, 3, 16, dtype=F64).repeat_interleave(3, 1).repeat_interleave(2, 2).flatten(1, 2)
    corners = [(3 * row) * 6 + 2 * column for row in range(3) for column in range(3)]
    line = agent_layer(layer, x, lambda q: q.unflatten(2, (9, 6)).mean(3), False)
    return naive.gap(layer(x), agent_layer(layer, x, lambda q: q[:, :, corners], False)), naive.gap(layer(x), line)


@check(
    "agent-attention",
    "layer with class token: biases are a 7 x 7 map upsampled + row + column parts + the token's; no shortcut, as the functional",
    below=1e-10,
    control="biases left out",
)
def _() -> tuple[float, float]:
    layer = AgentAttention(16, 2, (6, 9), agents=9, cls=True).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("gather", "spread")):
                parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 55, 16, dtype=F64)
    cells = [[(2 * row + i) * 9 + 3 * column + j for i in range(2) for j in range(3)] for row in range(3) for column in range(3)]

    def pool(q: Tensor) -> Tensor:
        return torch.stack([q[:, :, cell].mean(2) for cell in cells], 2)

    q, k, v = qkv(20)
    a = q[:, :, :5]
    same = naive.gap(agent_attention(q, a, k, v, shortcut=0.0), attend(q, k, v, "agent-attention", agents=a))
    return max(same, naive.gap(layer(x), agent_layer(layer, x, pool, True))), naive.gap(layer(x), agent_layer(layer, x, pool, False))


@check(
    "agent-attention",
    "AgentSD: softmax(s^0.3 Q A^T) softmax(s A K^T) V + 0.075 V, with gradients",
    below=1e-10,
    control="the scale s in both",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(24))
    a, s = q[:, :, ::4].detach(), 8**-0.5

    def truth(power: float) -> Tensor:
        return (s**power * q @ a.mT).softmax(-1) @ ((s * a @ k.mT).softmax(-1) @ v) + 0.075 * v

    out = agent_attention(q, a, k, v, spread_power=0.3, shortcut=0.075)
    return gap_with_gradients(out, truth(0.3), leaves), naive.gap(out, truth(1.0))
