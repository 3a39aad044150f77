"""Checks of tropical-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax.tropical_attention import TropicalAttention, hilbert_scores, maxplus_matmul


def digraph(scale: float) -> Tensor:
    weights = scale * torch.rand(7, 7, generator=torch.Generator().manual_seed(3), dtype=F64)
    return weights.fill_diagonal_(0.0)


def distances(w: Tensor) -> Tensor:
    """Lengths of the shortest paths to node 0, (n, 1), by relaxing every edge n times (Bellman and Ford)."""
    n = len(w)
    best = [math.inf] * n
    best[0] = 0.0
    for _ in range(n):
        for i in range(n):
            best[i] = min(best[i], *(float(w[i, j]) + best[j] for j in range(n)))
    return torch.tensor(best, dtype=F64)[:, None]


@check(
    "tropical-attention",
    "7-node digraph: six max-plus aggregations from -W[:, 0] == minus the exact distances",
    below=1e-12,
    control="softmax aggregation",
)
def _() -> tuple[float, float]:
    w = digraph(1.0)
    truth = -distances(w)
    hard = soft = -w[:, :1]
    for _ in range(6):
        hard = maxplus_matmul(-w, hard)
        soft = torch.logsumexp(-w + soft.T, -1, keepdim=True)
    return naive.gap(hard, truth), naive.gap(soft, truth)


def aggregated(scale: float, soft: bool) -> tuple[Tensor, Tensor]:
    """Six aggregations over scaled weights, divided by the scale, and the choices of the last: where its gradient goes."""
    w = -digraph(scale)
    found = w[:, :1]
    for _ in range(6):
        w = w.detach().requires_grad_()
        found = torch.logsumexp(w + found.detach().T, -1, keepdim=True) if soft else maxplus_matmul(w, found.detach())
    (choices,) = torch.autograd.grad(found.sum(), w)
    return found.detach() / scale, choices


@check(
    "tropical-attention",
    "weights times 1000: distances grow by 1000 and every row's gradient still goes to the same one key",
    below=1e-12,
    control="softmax aggregation",
)
def _() -> tuple[float, float]:
    def off(soft: bool) -> float:
        (near, chosen), (far, still) = aggregated(1.0, soft), aggregated(1000.0, soft)
        return max(naive.gap(near, far), naive.gap(chosen, still), naive.gap(chosen.amax(-1), torch.ones(7)))

    return off(False), off(True)


def tropical_loops(layer: TropicalAttention, x: Tensor, symmetric: bool) -> Tensor:
    """The module in loops over heads, queries, keys and channels."""
    b, n, dim = x.shape
    d = dim // layer.heads
    u = torch.log1p(x.clamp_min(0)) - (0 if layer.shift is None else layer.shift)
    out = torch.zeros_like(x)
    for batch in range(b):
        for h in range(layer.heads):
            part = u[batch, :, h * d : (h + 1) * d]
            q, k, v = (torch.stack([(row + w.weight).amax(1) for row in part]) for w in (layer.q, layer.k, layer.v))
            for i in range(n):
                best = torch.full((d,), float("-inf"), dtype=F64)
                for j in range(i + 1 if layer.causal else n):
                    gap = q[i] - k[j]
                    s = -(gap.max() - gap.min()) if symmetric else -(gap.sum() - d * gap.min())
                    best = torch.maximum(best, s + v[j])
                out[batch, i, h * d : (h + 1) * d] = torch.exp(best) - 1
    return out @ layer.out.weight.T


@check(
    "tropical-attention",
    "the module, both metrics, with norm, full and causal == loops; gradients pass gradcheck",
    below=1e-12,
    control="the other metric",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for symmetric in (True, False):
        layer = TropicalAttention(8, 2, tropical_norm=symmetric, symmetric=symmetric, causal=not symmetric).double()
        x = torch.randn(2, 6, 8, dtype=F64)
        gaps.append(naive.gap(layer(x)[0], tropical_loops(layer, x, symmetric)))
        others.append(naive.gap(layer(x)[0], tropical_loops(layer, x, not symmetric)))
    a, b = (torch.randn(3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    fits = torch.autograd.gradcheck(lambda a, b: (maxplus_matmul(a, b.T), hilbert_scores(a, b)), (a, b), raise_exception=False)
    return max(gaps) if fits else 1.0, min(others)


@check("tropical-attention", "scores do not change under q -> q + 3.7", below=1e-12, control="dot products")
def _() -> tuple[float, float]:
    q, k = torch.randn(5, 8, dtype=F64), torch.randn(6, 8, dtype=F64)
    return naive.gap(hilbert_scores(q + 3.7, k), hilbert_scores(q, k)), naive.gap((q + 3.7) @ k.T, q @ k.T)
