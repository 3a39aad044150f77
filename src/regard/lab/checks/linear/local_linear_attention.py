"""Checks of local-linear-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, rms, split
from regard.lab.checks.shared.regression import ridge_fits
from regard.lab.checks.shared.weighted import qkv
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.tasks.dynamics import switching_regression


@check(
    "local-linear-attention",
    "CG and direct, causal == an explicit weighted ridge fit for every query",
    below=1e-8,
    control="softmax attention",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(40, 5)
    truth = ridge_fits(q, k, v, 1e-2)
    found = [attend(q, k, v, get("local-linear-attention", solver=s, iterations=60, block=16), mask=Causal()) for s in ("cg", "direct")]
    return max(naive.gap(x, truth) for x in found), naive.gap(attend(q, k, v, mask=Causal()), truth)


@check(
    "local-linear-attention",
    "gradients by CG == those through the direct solution of small systems",
    below=1e-7,
    control="the solution held fixed",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(20, 5))
    s = (q @ k.mT / math.sqrt(5)).masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf)
    w = torch.exp(s - s.amax(-1, keepdim=True))
    z = k[:, :, None] - q[:, :, :, None]
    system = torch.einsum("bhij,bhijd,bhije->bhide", w, z, z) + 1e-2 * torch.eye(5, dtype=F64)
    mu = (w[..., None] * z).sum(-2)
    rho = torch.linalg.solve(system, mu[..., None])[..., 0]

    def read(rho: Tensor) -> Tensor:
        weights = w * (1 - (z @ rho[..., None])[..., 0])
        return weights @ v / (w.sum(-1) - (mu * rho).sum(-1))[..., None]

    out = attend(q, k, v, get("local-linear-attention", iterations=60), mask=Causal())
    seed = torch.randn(out.shape, dtype=F64)
    own, truth, fixed = (torch.autograd.grad((x * seed).sum(), leaves, retain_graph=True) for x in (out, read(rho), read(rho.detach())))
    gaps = [max(naive.gap(a, b) for a, b in zip(x, truth, strict=True)) for x in (own, fixed)]
    return max(gaps[0], naive.gap(out, read(rho))), gaps[1]


@check(
    "local-linear-attention",
    "Gaussian weights of width 0.8 and other ridges, causal and not, CG and direct == the explicit fits",
    below=1e-7,
    control="width 0.8 sqrt(2)",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(24, 3)
    own, other = [], math.inf
    for causal in (True, False):
        for solver in ("cg", "direct"):
            mechanism = get("local-linear-attention", kernel="rbf", width=0.8, ridge=0.05, solver=solver, iterations=60, block=7)
            out = attend(q, k, v, mechanism, mask=Causal() if causal else None)
            own.append(naive.gap(out, ridge_fits(q, k, v, 0.05, 0.8, causal=causal)))
            other = min(other, naive.gap(out, ridge_fits(q, k, v, 0.05, 0.8 * math.sqrt(2), causal=causal)))
    return max(own), other


@check(
    "local-linear-attention",
    "the layer == explicit fits on q and k over their root mean squares",
    below=1e-7,
    control="q and k as they are",
)
def _() -> tuple[float, float]:
    layer, x = drawn(Attention(16, 2, get("local-linear-attention", solver="direct"))), torch.randn(1, 12, 16, dtype=F64)
    q, k, v = (split(y(x), 2) for y in (layer.q, layer.k, layer.v))
    normed = [rms(y, 1e-6, norm.weight) for y, norm in ((q, layer.q_norm), (k, layer.k_norm))]  # type: ignore[arg-type]
    truths = [layer.out(joined(ridge_fits(a, b, v, 1e-2))) for a, b in (normed, (q, k))]
    return naive.gap(layer(x), truths[0]), naive.gap(layer(x), truths[1])


@check("local-linear-attention", "ridge 1e9: causal softmax attention", below=1e-6, control="ridge 1")
def _() -> tuple[float, float]:
    q, k, v = qkv(40, 5)
    truth = attend(q, k, v, mask=Causal())
    found = [naive.gap(attend(q, k, v, get("local-linear-attention", ridge=r), mask=Causal()), truth) for r in (1e9, 1.0)]
    return found[0], found[1]


@check("local-linear-attention", "values that are affine in the keys, read at the query: error", below=1e-6, control="softmax attention")
def _() -> tuple[float, float]:
    q, k, _ = qkv(60, 5)
    line, shift = torch.randn(5, 4, dtype=F64), torch.randn(4, dtype=F64)
    v, truth = k @ line + shift, (q @ line + shift)[:, :, 20:]
    mechanism = get("local-linear-attention", ridge=1e-10, solver="direct")
    found = [naive.gap(attend(q, k, v, m, mask=Causal())[:, :, 20:], truth) for m in (mechanism, get("softmax"))]
    return found[0], found[1]


@check("local-linear-attention", "CG at N = 2048, D = 64: largest tensor over N x N x D", below=0.01, control="z written out at N = 128")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 2048, 64) for _ in range(3))
    own = largest_tensor(lambda: attend(q, k, v, get("local-linear-attention", iterations=4), mask=Causal())) / (2048**2 * 64)
    return own, largest_tensor(lambda: k[:, :, None, :128] - q[:, :, :128, None]) / (128**2 * 64)


@check("local-linear-attention", "token by token == the whole, grouped heads", below=1e-9, control="softmax attention")
def _() -> tuple[float, float]:
    q, k, v = qkv(20, 5)
    k, v = k[:, :1], v[:, :1]
    mechanism = get("local-linear-attention", iterations=40)
    whole, state, outs = attend(q, k, v, mechanism, mask=Causal()), None, []
    for t in range(20):
        o, state = step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], mechanism, state)
        outs.append(o)
    return naive.gap(torch.cat(outs, 2), whole), naive.gap(attend(q, k, v, mask=Causal()), whole)


@check(
    "local-linear-attention",
    "piecewise-linear regression, 3 seeds: its error over the better of a kernel smoother and a growing ridge",
    below=0.7,
    control="ridge 1e6, which smooths",
)
def _() -> tuple[float, float]:
    def ratio(ridge: float, seed: int) -> float:
        k, v = switching_regression(256, 8, 4, seed)
        q = torch.cat((k[:, :, 1:], k[:, :, -1:]), 2)  # predict each value before it is seen

        def miss(out: Tensor) -> float:
            return float((out[:, :, :-1] - v[:, :, 1:]).square().mean())

        own = miss(attend(q, k, v, get("local-linear-attention", kernel="rbf", ridge=ridge, iterations=40), mask=Causal()))
        gap = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
        smooth = (-gap / 2).masked_fill(torch.ones(256, 256).triu(1).bool(), -math.inf).softmax(-1) @ v
        return own / min(miss(smooth), miss(ridge_fits(q, k, v, 1e-3, growing=True)))

    return max(ratio(1e-3, s) for s in range(3)), min(ratio(1e6, s) for s in range(3))
