"""Adaptive filter attention as a layer (id 70; Racioppo, 2025)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Input, Mask, Modified, RowLocal, Weighted
from regard.algebra.part import bind
from regard.catalog.registry import register
from regard.engine import weights
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes

HEADS = ("mu", "sigma2", "eta2", "gamma2", "nu", "tau2")


def propagated(gap: Tensor, mu: Tensor, sigma2: Tensor, eta2: Tensor, gamma2: Tensor) -> tuple[Tensor, Tensor]:
    """(E, V) at a distance in time: the solution of dV/dt = -2 mu V + sigma^2, V(0) = eta^2, plus gamma^2; mu -> 0 gives sigma^2 t."""
    fade = torch.exp(-mu * gap)
    still = mu * gap < 1e-6  # (1 - e^{-2 mu t}) / (2 mu) is t there, to its last digit in float32
    grown = torch.where(still, gap, -torch.expm1(-2 * mu * gap) / (2 * torch.where(still, 1.0, mu)))
    return fade, sigma2 * grown + eta2 * fade * fade + gamma2


def likelihood(
    s: Tensor,
    t_q: Tensor,
    t_k: Tensor,
    q_square: Tensor,
    k_square: Tensor,
    mu: Tensor,
    sigma2: Tensor,
    eta2: Tensor,
    gamma2: Tensor,
    nu: Tensor,
    tau2: Tensor,
    robust: bool,
) -> Tensor:
    """The score of a pair from s = Re(q~* k~); nu comes times the number of channels."""
    fade, variance = propagated((t_q - t_k).abs(), mu, sigma2, eta2, gamma2)
    residual = q_square + fade * fade * k_square - 2 * fade * s
    ratio = residual / (nu * variance)
    return tau2 * (-torch.log(variance) - (torch.log1p(ratio) if robust else ratio))


def carried(s: Tensor, c: Tensor, t_q: Tensor, t_k: Tensor, mu: Tensor) -> Tensor:
    return torch.exp(s - c) * torch.exp(-mu * (t_q - t_k).abs())


def exp_shifted(s: Tensor, c: Tensor) -> Tensor:
    return torch.exp(s - c)


def description(robust: bool = True) -> Weighted:
    """The weighted form on rotated q and k, real and imaginary parts side by side; softmax by likelihood, values faded by E."""
    sides = [Input(name, shape) for name, shape in (("t_q", "bhq"), ("t_k", "bhk"), ("q_square", "bhq"), ("k_square", "bhk"))]
    inputs = (*sides, *(Input(name, "h") for name in HEADS))
    return Weighted(position=Modified(bind(likelihood, robust=robust), inputs), normalizer=RowLocal(carried, exp_shifted, shift="max"))


class FilterResult(NamedTuple):
    """output: complex (B, H, N, d); of diagnostics, else None: weights: the softmax's (B, H, N, N); total: log of the sum of precisions a
    row (B, H, N); variance: what a token's has grown to at the query's time (B, H, N, N)."""

    output: Tensor
    weights: Tensor | None = None
    total: Tensor | None = None
    variance: Tensor | None = None


def rotated(x: Tensor, times: Tensor, omega: Tensor, sign: float) -> Tensor:
    """e^{sign i omega t} x: x (B, H, N, d) complex, times (B, N), omega (H, d)."""
    return x * torch.polar(torch.ones((), dtype=times.dtype, device=x.device), sign * times[:, None, :, None] * omega[:, None])


def adaptive_filter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    *,
    mu: Tensor,
    omega: Tensor,
    sigma2: Tensor,
    eta2: Tensor,
    gamma2: Tensor,
    nu: Tensor | float = 1.0,
    tau2: Tensor | float = 1.0,
    robust: bool = True,
    mask: Mask | None = None,
    diagnostics: bool = False,
) -> FilterResult:
    """Causal by default (mask=None). q, k, v complex (B, H, N, d) in the eigenbasis; times (B, N), rising, or (N,); mu, sigma2 (process), eta2
    (measurement), gamma2 (anchor), nu, tau2 (H,) or numbers, all >= 0; omega (H, d). robust: Student's likelihood, else Gaussian."""
    if not (q.is_complex() and k.is_complex() and v.is_complex()):
        raise RegardError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected complex tensors (use torch.complex)")
    times = times.to(q.real.dtype)
    times = times.expand(len(q), -1) if times.dim() == 1 else times
    if times.shape != (len(q), q.shape[2]):
        raise RegardError(f"times has shape {tuple(times.shape)}; expected {(len(q), q.shape[2])}")
    a, b, c = (rotated(x, times, omega, -1.0) for x in (q, k, v))
    heads, d = q.shape[1], q.shape[-1]

    def side(x: Tensor | float) -> Tensor:
        return torch.as_tensor(x, dtype=times.dtype, device=q.device).expand(heads)

    where = times[:, None].expand(-1, heads, -1)
    sides: dict[str, Any] = {
        "t_q": where,
        "t_k": where,
        "q_square": q.abs().square().sum(-1),
        "k_square": k.abs().square().sum(-1),
        **{
            name: side(x)
            for name, x in (
                ("mu", mu),
                ("sigma2", sigma2),
                ("eta2", eta2),
                ("gamma2", gamma2),
                ("nu", torch.as_tensor(nu) * d),
                ("tau2", tau2),
            )
        },
    }
    flat_q, flat_k, flat_v = (torch.cat((x.real, x.imag), -1) for x in (a, b, c))
    mechanism, full = description(robust), Causal() if mask is None else mask
    out = attend(flat_q, flat_k, flat_v, mechanism, mask=full, scale=1.0, **sides)
    output = rotated(torch.complex(*out.to(times.dtype).chunk(2, -1)), times, omega, 1.0)
    if not diagnostics:
        return FilterResult(output)
    at = weights(flat_q, flat_k, mechanism, mask=full, scale=1.0, **sides)
    assert at is not None
    per_head = {name: sides[name][:, None, None] for name in HEADS}
    gap = (where[..., :, None] - where[..., None, :]).abs()
    fade, variance = propagated(gap, *(per_head[name] for name in HEADS[:4]))
    squares = {"q_square": sides["q_square"][..., None], "k_square": sides["k_square"][..., None, :]}
    s = likelihood(flat_q @ flat_k.mT, where[..., None], where[..., None, :], robust=robust, **squares, **per_head)
    seen = torch.ones_like(s, dtype=torch.bool).tril() if mask is None else at != 0
    return FilterResult(output, at / fade, s.masked_fill(~seen, float("-inf")).logsumexp(-1), variance)


def anisotropic_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    mu: Tensor,
    omega: Tensor,
    sigma2: Tensor,
    eta2: Tensor,
    gamma2: Tensor,
    nu: float = 1.0,
    tau2: float = 1.0,
) -> Tensor:
    """Every channel with its own mu, sigma2, eta2, gamma2 (H, d), in O(N^2 d) memory: log V and R / V become means over channels. For small N."""
    gap = (times[:, None] - times).abs()[..., None]  # (N, N, 1)
    fade, variance = propagated(gap, *(x[:, None, None] for x in (mu, sigma2, eta2, gamma2)))  # (H, N, N, d)
    a, b, c = (rotated(x, times.expand(len(q), -1), omega, -1.0) for x in (q, k, v))
    residual = (a[:, :, :, None] - fade * b[:, :, None]).abs().square()
    s = tau2 * (-variance.log().mean(-1) - torch.log1p((residual / variance).mean(-1) / nu))
    p = s.masked_fill(times[:, None] < times, float("-inf")).softmax(-1)
    out = torch.einsum("bhij,hijd,bhjd->bhid", p.to(c.dtype), fade.to(c.dtype), c)
    return rotated(out, times.expand(len(q), -1), omega, 1.0)


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
        self.dim = dim
        if frequencies not in ("learned", "rope"):
            raise RegardError(f"frequencies={frequencies!r}; expected learned or rope")
        d = head_dim or max(1, dim // heads)
        self.heads, self.d, self.context_len, self.robust, self.gated = heads, d, context_len, robust, gated
        self.q, self.k, self.v = (nn.Linear(dim, 2 * heads * d) for _ in range(3))
        self.out = nn.Linear(2 * heads * d, dim)
        self.decay = nn.Parameter(torch.zeros(heads))
        self.turns = nn.Parameter(torch.randn(heads, d) * 0.5) if frequencies == "learned" else None
        start = inverse_softplus(noise)
        self.process, self.measured, self.anchor = (nn.Parameter(torch.full((heads,), start)) for _ in range(3))
        self.robustness, self.temperature = (nn.Parameter(torch.full((heads,), inverse_softplus(1.0))) for _ in range(2))

    @property
    def mu(self) -> Tensor:
        return (1 - torch.sigmoid(self.decay)) * 10 / (2 * self.context_len) + 1e-5

    @property
    def omega(self) -> Tensor:
        if self.turns is None:
            channels = torch.arange(self.d, dtype=torch.float64, device=self.decay.device)
            return (10000 ** (-channels / self.d)).to(self.decay.dtype).repeat(self.heads, 1)
        return self.turns * (10 * 2 * math.pi / (2 * self.context_len))

    def filtered(self, x: Tensor, times: Tensor | None = None, diagnostics: bool = True) -> FilterResult:
        wide = torch.promote_types(x.dtype, torch.float32)  # there are no complex numbers of half precision
        times = torch.arange(x.shape[1], device=x.device, dtype=wide) if times is None else times
        q, k, v = (
            torch.complex(*y.to(wide).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(2, -1))
            for y in (self.q(x), self.k(x), self.v(x))
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
        flat = torch.cat((o.real, o.imag), -1).transpose(1, 2).flatten(-2)
        return self.out(flat.to(self.out.weight.dtype))  # type: ignore[no-any-return]

    @takes(x="batch length dim")
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
