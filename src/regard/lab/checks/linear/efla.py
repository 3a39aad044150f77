"""Checks of efla."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, short_conv, silu, split, unit
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.efla import exact, runge_kutta


@check("efla", "one token == the matrix exponential of its differential equation", below=1e-12, control="DeltaNet's Euler step")
def _() -> tuple[float, float]:
    k, v, s, beta = torch.randn(6, dtype=F64), torch.randn(4, dtype=F64), torch.randn(6, 4, dtype=F64), 0.7
    system = torch.zeros(10, 10, dtype=F64)  # of [S; the constant v^T as 4 more rows]
    system[:6, :6], system[:6, 6:] = -torch.outer(k, k), torch.outer(k, torch.ones(4, dtype=F64))
    moved = torch.linalg.matrix_exp(beta * system)
    truth = moved[:6, :6] @ s + torch.stack([moved[:6, 6:] @ (F.one_hot(torch.tensor(c), 4).to(F64) * v[c]) for c in range(4)], -1)

    def one(strength: float) -> Tensor:
        return s - strength * torch.outer(k, k @ s) + strength * torch.outer(k, v)

    alpha = float(exact(torch.tensor(beta, dtype=F64), k.square().sum()))
    return naive.gap(one(alpha), truth), naive.gap(one(beta), truth)


def delta_loop(q: Tensor, k: Tensor, v: Tensor, strength: Tensor) -> tuple[Tensor, float]:
    """(outputs, the largest norm of the state) of the delta rule a token at a time, scores times D^-1/2."""
    state, outs, most = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=k.dtype), [], 0.0
    for t in range(k.shape[2]):
        kt, vt, a = k[:, :, t], v[:, :, t], strength[:, :, t, None, None]
        state = state - a * kt[..., None] * (kt[..., None, :] @ state) + a * kt[..., None] * vt[..., None, :]
        outs.append((q[:, :, t, None, :] @ state)[..., 0, :] * q.shape[-1] ** -0.5)
        most = max(most, float(state.detach().norm(dim=(-2, -1)).max()))
    return torch.stack(outs, 2), most


@check("efla", "chunks with gradients, and streams == the token loop, keys of any length", below=1e-9, control="beta itself (DeltaNet)")
def _() -> tuple[float, float]:
    q, k, v = qkv(70)
    leaves = q, k, v, beta = tuple(x.requires_grad_() for x in (q, k, v, torch.rand(1, 2, 70, dtype=F64)))
    square = k.square().sum(-1)
    truth = delta_loop(q, k, v, (1 - torch.exp(-beta * square)) / square)[0]
    out = attend(q, k, v, "efla", beta=beta)
    own = max(gap_with_gradients(out, truth, leaves), naive.gap(streamed("efla", q, k, v, beta=beta), truth))
    return own, naive.gap(out, delta_loop(q, k, v, beta)[0])


@check("efla", "|k|^2 = 9, beta = 1, 200 tokens: largest norm of the state", below=20, control="DeltaNet")
def _() -> tuple[float, float]:
    q, k, v = qkv(200)
    k, one = 3 * F.normalize(k, dim=-1), torch.ones(1, 2, 200, dtype=F64)
    alpha = exact(one, k.square().sum(-1))
    out = attend(q, k, v, "efla", beta=one)
    loop, size = delta_loop(q, k, v, alpha)
    return (size if naive.gap(out, loop) < 1e-8 else math.inf), delta_loop(q, k, v, one)[1]


@check("efla", "unit keys: DeltaNet with 1 - exp(-beta); |k|^2 = 1e-12: alpha is beta", below=1e-9, control="keys of length 1.5")
def _() -> tuple[float, float]:
    q, k, v = qkv(50)
    k, beta = F.normalize(k, dim=-1), torch.rand(1, 2, 50, dtype=F64)

    def miss(k: Tensor) -> float:
        return naive.gap(attend(q, k, v, "efla", beta=beta), attend(q, k, v, "deltanet", beta=1 - torch.exp(-beta)))

    tiny = exact(beta, torch.full_like(beta, 1e-12)) / beta
    return max(miss(k), naive.gap(tiny, torch.ones_like(tiny))), miss(1.5 * k)


@check(
    "efla",
    "short keys, where the series stands for the quotient: relative distance from (1 - e^(-beta |k|^2)) / |k|^2, and of its slope",
    below=2e-15,
    control="the Runge-Kutta step of order 2",
)
def _() -> tuple[float, float]:
    beta, x = torch.rand(200, dtype=F64) + 0.5, torch.rand(200, dtype=F64) * 1e-4
    square = (x / beta).requires_grad_()
    truth = -torch.expm1(-beta * square) / square
    found = exact(beta, square)
    flat = torch.zeros(3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(exact(beta[:3], flat).sum(), flat)  # of a key of length zero: -beta^2 / 2
    bad = naive.gap(slope, -beta[:3].square() / 2)
    return max(bad, naive.gap(found / truth, torch.ones_like(x))), naive.gap(runge_kutta(beta, square, 2) / truth, torch.ones_like(x))


@check("efla", "order n: a = beta sum_{i < n} (-beta |k|^2)^i / (i + 1)!, in the delta rule", below=1e-10, control="one order more")
def _() -> tuple[float, float]:
    q, k, v = qkv(12)
    beta, square = torch.rand(1, 2, 12, dtype=F64), (0.3 * k).square().sum(-1)

    def truth(order: int) -> Tensor:
        a = sum(beta * (-beta * square) ** i / math.factorial(i + 1) for i in range(order))
        return delta_loop(q, 0.3 * k, v, torch.as_tensor(a))[0]

    found = [(attend(q, 0.3 * k, v, get("efla", order=n), beta=beta), n) for n in (1, 2, 4)]
    return max(naive.gap(out, truth(n)) for out, n in found), min(naive.gap(out, truth(n + 1)) for out, n in found)


@check(
    "efla",
    "the layer, with beta by sigmoid and by softplus == its formula by hand: convolutions, silu, q of unit length, keys as they are, norm",
    below=1e-10,
    control="keys of unit length",
)
def _() -> tuple[float, float]:
    x, gaps, other = torch.randn(2, 9, 16, dtype=F64), [], math.inf
    for kind in ("sigmoid", "softplus"):
        layer = Attention(16, 2, get("efla", beta=kind))
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (16, 16) for name in ("q", "k", "v", "out")}
        shapes |= {f"convs.{at}.weight": (16, 1, 4) for at in range(3)}
        gaps.append(misshapen(layer, shapes | {"inputs.projected.beta.up.weight": (2, 16), "out_norm.weight": (8,)}))
        layer = drawn(layer)
        flat = [short_conv(y(x), c.weight) for y, c in zip((layer.q, layer.k, layer.v), layer.convs, strict=True)]  # type: ignore[arg-type]
        q, k, v = (silu(split(y, 2)) for y in flat)
        b = layer.inputs.projected["beta"](x)[..., 0]
        beta = 1 / (1 + torch.exp(-b)) if kind == "sigmoid" else torch.log(1 + torch.exp(b))

        def truth(k: Tensor, q: Tensor = q, v: Tensor = v, beta: Tensor = beta, layer: Attention = layer) -> Tensor:
            square = k.square().sum(-1)
            o = delta_loop(unit(q, 1e-6), k, v, (1 - torch.exp(-beta * square)) / square)[0]
            return layer.out(joined(rms(o, 1e-5, layer.out_norm.weight)))  # type: ignore[arg-type, no-any-return]

        gaps.append(naive.gap(layer(x), truth(k)))
        other = min(other, naive.gap(layer(x), truth(unit(k, 1e-6))))
    return max(gaps), other
