"""Adaptive filter attention as a layer (id 70; Racioppo, 2025)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog.registry import register
from ..errors import RegardError
from ..mechanisms.weighted.afa import FilterResult, adaptive_filter


def inverse_softplus(x: float) -> float:
    return math.log(math.expm1(x))


@register("afa", kind="module")
class AdaptiveFilterAttention(nn.Module):
    """x (B, N, dim), times (B, N) or (N,) or None for 0 .. N - 1 -> (B, N, dim), causal.

    Each head has head_dim complex channels and learns its decay mu in (1e-5, 10 / (2 context_len)], frequencies, noises, nu and tau.
    frequencies: "learned", or "rope": fixed at 10000^(-c / d). robust: Student's likelihood. gated: output times sigmoid(log of the summed
    precision over the prior's). `filtered` gives the diagnostics, `predict` the next step e^{-mu + i omega} o.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        head_dim: int | None = None,
        context_len: int = 64,
        frequencies: str = "learned",
        robust: bool = True,
        gated: bool = False,
        noise: float = 0.1,
    ):
        super().__init__()
        if frequencies not in ("learned", "rope"):
            raise RegardError(f"frequencies={frequencies!r}; expected learned or rope")
        d = head_dim or max(1, dim // heads)
        self.heads, self.d, self.context_len, self.robust, self.gated = heads, d, context_len, robust, gated
        self.q, self.k, self.v = (nn.Linear(dim, 2 * heads * d) for _ in range(3))
        self.out = nn.Linear(2 * heads * d, dim)
        self.decay = nn.Parameter(torch.zeros(heads))
        if frequencies == "rope":
            self.register_buffer("turns", (10000 ** (-torch.arange(d) / d)).repeat(heads, 1))
        else:
            self.turns = nn.Parameter(torch.randn(heads, d) * 0.5)
        self.scaled = frequencies == "learned"
        start = inverse_softplus(noise)
        self.process, self.measured, self.anchor = (nn.Parameter(torch.full((heads,), start)) for _ in range(3))
        self.robustness, self.temperature = (nn.Parameter(torch.full((heads,), inverse_softplus(1.0))) for _ in range(2))

    @property
    def mu(self) -> Tensor:
        return (1 - torch.sigmoid(self.decay)) * 10 / (2 * self.context_len) + 1e-5

    @property
    def omega(self) -> Tensor:
        turns: Tensor = self.turns  # type: ignore[assignment]
        return turns * (10 * 2 * math.pi / (2 * self.context_len)) if self.scaled else turns

    def filtered(self, x: Tensor, times: Tensor | None = None, diagnostics: bool = True) -> FilterResult:
        times = torch.arange(x.shape[1], device=x.device, dtype=x.dtype) if times is None else times
        q, k, v = (
            torch.complex(*y.unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(2, -1)) for y in (self.q(x), self.k(x), self.v(x))
        )
        return adaptive_filter(
            q,
            k,
            v,
            times,
            mu=self.mu,
            omega=self.omega,
            sigma2=F.softplus(self.process),
            eta2=F.softplus(self.measured),
            gamma2=F.softplus(self.anchor),
            nu=F.softplus(self.robustness),
            tau2=F.softplus(self.temperature).square(),
            robust=self.robust,
            diagnostics=diagnostics,
        )

    def close(self, o: Tensor) -> Tensor:
        return self.out(torch.cat((o.real, o.imag), -1).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, times: Tensor | None = None) -> Tensor:
        found = self.filtered(x, times, self.gated)
        o = found.output
        if self.gated and found.total is not None:
            prior = -torch.log(
                F.softplus(self.process) / (2 * self.mu) + F.softplus(self.anchor)
            )  # the precision of a token carried for ever
            o = o * torch.sigmoid(found.total - prior[:, None])[..., None]
        return self.close(o)

    def predict(self, x: Tensor, times: Tensor | None = None) -> Tensor:
        """The output one unit of time later."""
        o = self.filtered(x, times, False).output
        return self.close(o * torch.exp(torch.complex(-self.mu[:, None].expand_as(self.omega), self.omega))[:, None])
