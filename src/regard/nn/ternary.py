"""Weights of three values and activations of eight bits, learned straight through (BitNet b1.58, Ma et al., 2024), and gated corrections of
low rank in full precision beside them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError
from .parts import Momentary

MODES = ("hgf", "ternary", "full")


def ternary(weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(clip(round(W / (gamma + eps)), -1, 1), gamma), gamma = mean |W|; no gradients."""
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    gamma = w.abs().mean()
    return (w / (gamma + eps)).round().clamp(-1, 1), gamma


def eight_bits(x: Tensor, eps: float = 1e-5) -> Tensor:
    """round(127 x / max |x|) max |x| / 127 for each token (..., D), gradients straight through."""
    top = x.detach().abs().amax(-1, keepdim=True).clamp_min(eps)
    return x + ((127 * x.detach() / top).round() * top / 127 - x.detach())


class BitLinear(nn.Linear):
    """(..., in) -> (..., out): gamma W_t applied to eight_bits(RMSNorm(x)); gradients reach `weight` as if it were used itself.

    norm: RMSNorm with a gain before; quantised: activations of eight bits. eps: of both scales; norm_eps: of the norm.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = False,
        norm: bool = True,
        quantised: bool = True,
        eps: float = 1e-5,
        norm_eps: float = 1e-6,
    ):
        if min(inputs, outputs) < 1 or eps <= 0:
            raise RegardError(f"inputs={inputs}, outputs={outputs}, eps={eps}; expected at least 1 of each and eps above 0")
        super().__init__(inputs, outputs, bias)
        self.norm = nn.RMSNorm(inputs, norm_eps) if norm else nn.Identity()
        self.quantised, self.eps = quantised, eps

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        levels, gamma = ternary(self.weight, self.eps)
        weight = self.weight + (levels * gamma - self.weight.detach()).to(self.weight.dtype)
        return F.linear((eight_bits(wide, self.eps) if self.quantised else wide).to(x.dtype), weight, self.bias)


def rank_of(inputs: int, outputs: int, share: float = 0.135) -> int:
    """The rank whose 16-bit factors take `share` of the ternary weights' memory, at least 1."""
    return max(1, round(share * math.log2(3) * inputs * outputs / (16 * (inputs + outputs))))


class HGFLinear(Momentary):
    """y = BitLinear(x) + g B A x, g = sigmoid(w x + b): (..., in) -> (..., out). rank None: 13.5% of the ternary weights' memory, at least 1. gate: "token" or "channel"; gate_bias: b at first.

    options: of BitLinear. `openness` is the last call's mean gate; `penalty()` of a model asks for it, so that corrections stay selective.
    """

    def __init__(self, inputs: int, outputs: int, rank: int | None = None, gate: str = "token", gate_bias: float = -2.0, **options: Any):
        super().__init__()
        if gate not in ("token", "channel") or (rank is not None and rank < 1):
            raise RegardError(f"gate={gate!r}, rank={rank}; expected 'token' or 'channel', and a rank of at least 1 or None")
        self.ternary = BitLinear(inputs, outputs, **options)
        self.down = nn.Linear(inputs, rank or rank_of(inputs, outputs), bias=False)
        self.up = nn.Linear(self.down.out_features, outputs, bias=False)
        self.gate = nn.Linear(inputs, outputs if gate == "channel" else 1)
        for zero in (self.up.weight, self.gate.weight):
            nn.init.zeros_(zero)
        nn.init.constant_(self.gate.bias, gate_bias)
        self.openness: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x).sigmoid()
        self.openness = g.mean()
        return self.ternary(x) + g * self.up(self.down(x))  # type: ignore[no-any-return]

    def memory(self) -> dict[str, float]:
        """Bytes: ternary weights at log2(3) bits, factors and gate at 16; overhead = factors over ternary weights."""
        backbone = self.ternary.weight.numel() * math.log2(3) / 8
        factors = 2.0 * (self.down.weight.numel() + self.up.weight.numel())
        gate = 2.0 * sum(p.numel() for p in self.gate.parameters())
        return {"ternary": backbone, "factors": factors, "gate": gate, "overhead": factors / backbone}


def projection(mode: str, inputs: int, outputs: int, **options: Any) -> nn.Module:
    """A linear layer of a mode, without bias."""
    if mode not in MODES:
        raise RegardError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
    if mode == "full":
        return nn.Linear(inputs, outputs, bias=False)
    return HGFLinear(inputs, outputs, **options) if mode == "hgf" else BitLinear(inputs, outputs)


def penalty(model: nn.Module) -> Tensor:
    """The mean gate of a model's last call, over its HGFLinear layers."""
    found = [m.openness for m in model.modules() if isinstance(m, HGFLinear) and m.openness is not None]
    if not found:
        raise RegardError("model: expected HGFLinear layers that have been called")
    return torch.stack(found).mean()
