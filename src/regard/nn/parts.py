"""Small layers that several models share: norms, short convolutions, projections, SwiGLU, layer scale."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError


class UnitNorm(nn.Module):
    """x / |x| over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def head_norm(kind: str, width: int) -> nn.Module:
    """A norm over a head's channels: "" none, "l2", "rms", "srms" (no learned factors), "gated_rms" or "layer"."""
    known: dict[str, Callable[[], nn.Module]] = {
        "": nn.Identity,
        "l2": UnitNorm,
        "rms": lambda: nn.RMSNorm(width, eps=1e-6),
        "srms": lambda: nn.RMSNorm(width, eps=1e-6, elementwise_affine=False),
        "layer": lambda: nn.LayerNorm(width),
        "gated_rms": lambda: GatedRMSNorm(width),
    }
    if kind not in known:
        raise RegardError(f"norm {kind!r}; expected one of {', '.join(map(repr, known))}")
    return known[kind]()


class GatedRMSNorm(nn.Module):
    """y = scale * x / rms(x) * sigmoid(gate * x), elementwise scale and gate (ReLA's)."""

    def __init__(self, width: int, eps: float = 1e-8):
        super().__init__()
        self.eps, self.scale, self.gate = eps, nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * torch.sigmoid(self.gate * x)


class HeadGate(nn.Module):
    """x (B, L, dim) -> sigmoid(G_h(x)) (B, H, L, 1), times `factor`.

    kind: "head": linear on the head's own slice of x; "head_mlp": with a hidden layer a quarter as wide; "heads": linear on all of x.
    init: the gate's start. factor: 1 / init makes the gated layer start as the ungated one.
    """

    def __init__(self, dim: int, heads: int, kind: str, init: float = 0.5, factor: float = 1.0, std: float | None = None):
        super().__init__()
        if not 0 < init < 1:
            raise RegardError(f"gate_init={init}; expected a number between 0 and 1")
        if kind != "heads" and dim % heads:
            raise RegardError(f"out_gate={kind!r} cuts dim={dim} into heads={heads} slices; expected a multiple, or out_gate='heads'")
        self.kind, self.heads, self.factor = kind, heads, factor
        own = dim if kind == "heads" else dim // heads
        hidden = max(1, own // 4)
        self.hidden = nn.Parameter(torch.randn(heads, own, hidden) / own**0.5) if kind == "head_mlp" else None
        width = hidden if kind == "head_mlp" else own
        self.weight = nn.Parameter(torch.randn(heads, width) * (width**-0.5 if std is None else std))
        self.bias = nn.Parameter(torch.full((heads,), math.log(init / (1 - init))))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unsqueeze(-2).expand(*x.shape[:-1], self.heads, -1) if self.kind == "heads" else x.unflatten(-1, (self.heads, -1))
        if self.hidden is not None:
            parts = torch.relu(torch.einsum("blhd,hdf->blhf", parts, self.hidden))
        logits = (parts * self.weight).sum(-1) + self.bias
        return self.factor * torch.sigmoid(logits).transpose(1, 2).unsqueeze(-1)


class ShortConv(nn.Module):
    """Causal depthwise convolution over the length of x (B, L, channels); the state is the last width - 1 inputs."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-1, 1) / width**0.5)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        past = x.new_zeros(x.shape[0], self.width - 1, x.shape[2]) if state is None else state
        x = torch.cat((past, x), 1)
        out = F.conv1d(x.transpose(1, 2), self.weight, groups=x.shape[2]).transpose(1, 2)
        return out, x[:, x.shape[1] - self.width + 1 :]


class Projection(nn.Module):
    """x (B, L, dim) -> (B, heads, L, channels), through `rank` channels if given; `bias` None: no bias, else its start."""

    def __init__(self, dim: int, heads: int, channels: int, rank: int | None, bias: float | None):
        super().__init__()
        self.channels = channels
        self.down = nn.Linear(dim, rank, False) if rank else nn.Identity()
        self.up = nn.Linear(rank or dim, heads * channels, bias is not None)
        if bias is not None:
            nn.init.constant_(self.up.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)).unflatten(-1, (-1, self.channels)).transpose(1, 2)  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """W3(act(W1 x) * W2 x): kind "swiglu" (act silu) or "sglu" (no act)."""

    def __init__(self, dim: int, hidden: int, kind: str = "swiglu"):
        super().__init__()
        if kind not in ("swiglu", "sglu"):
            raise RegardError(f"mlp {kind!r}; expected swiglu or sglu")
        self.act = F.silu if kind == "swiglu" else nn.Identity()
        self.gate, self.up, self.down = nn.Linear(dim, hidden, False), nn.Linear(dim, hidden, False), nn.Linear(hidden, dim, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class SwiGLU(GatedMLP):
    """W3(silu(W1 x) * W2 x)."""


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch, starting small (1e-4 in the sigmoid-attention recipe)."""

    def __init__(self, dim: int, init: float = 1e-4):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
