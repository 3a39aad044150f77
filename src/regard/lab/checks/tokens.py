"""Checks of tropical attention and of multi-token attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...algebra import Causal
from ...engine import attend
from ...nn import MultiTokenAttention, TropicalAttention, maxplus_matmul
from ...nn.tropical import hilbert_scores
from ...tasks.algorithmic import shortest_paths
from .. import naive
from ..verification import check

F64 = torch.float64


def digraph(scale: float) -> Tensor:
    weights = scale * torch.rand(7, 7, generator=torch.Generator().manual_seed(3), dtype=F64)
    return weights.fill_diagonal_(0.0)


@check(
    "tropical-attention",
    "7-node digraph: six max-plus aggregations from -W[:, 0] == minus the exact distances",
    below=1e-12,
    control="softmax aggregation",
)
def _() -> tuple[float, float]:
    w = digraph(1.0)
    truth = -shortest_paths(w)[:, :1]
    hard = soft = -w[:, :1]
    for _ in range(6):
        hard = maxplus_matmul(-w, hard)
        soft = torch.logsumexp(-w + soft.T, -1, keepdim=True)
    return naive.gap(hard, truth), naive.gap(soft, truth)


@check(
    "tropical-attention",
    "weights times 1000: the share of arg max choices that change",
    below=0.0,
    control="softmax's nearest key of a bounded score",
)
def _() -> tuple[float, float]:
    choices = [(-digraph(scale)).unsqueeze(-1) + (-digraph(scale))[:, :1] for scale in (1.0, 1000.0)]
    moved = float((choices[0].argmax(1) != choices[1].argmax(1)).double().mean())
    bounded = [torch.tanh(x.squeeze(-1) / 3) + 0.01 * torch.arange(7) for x in choices]  # saturated scores lose the order
    return moved, float((bounded[0].argmax(1) != bounded[1].argmax(1)).double().mean())


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


def multi(**options: object) -> MultiTokenAttention:
    return MultiTokenAttention(16, 4, queries=3, keys=5, **options).double()  # type: ignore[arg-type]


def scramble(layer: MultiTokenAttention) -> MultiTokenAttention:
    for name, parameter in layer.named_parameters():
        if name.split(".")[0] in ("pre", "post", "pre_mix", "post_mix"):
            nn.init.normal_(parameter, std=0.5)
    return layer


@check("mta", "identity kernels == softmax attention", below=1e-12, control="random kernels")
def _() -> tuple[float, float]:
    layer = multi(norm=False, gate=False)
    x = torch.randn(2, 19, 16, dtype=F64)
    q, k, v = layer.heads_of(x, 0)
    truth = layer.close(attend(q, k, v, mask=Causal()))
    own = naive.gap(layer(x), truth)
    return own, naive.gap(scramble(layer)(x), truth)


@check(
    "mta",
    "random kernels: changing token 12 changes nothing before it",
    below=1e-12,
    control="convolving scores that still hold the future",
)
def _() -> tuple[float, float]:
    layer = scramble(multi())
    x = torch.randn(1, 19, 16, dtype=F64)
    other = x.clone()
    other[:, 12] += 1

    def leaking(x: Tensor) -> Tensor:
        q, k, v = layer.heads_of(x, 0)
        s = layer.pre_mix(layer.pre(q @ k.transpose(-1, -2) / 2))
        p = s.masked_fill(~torch.ones(19, 19, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        return layer.close(layer.post_mix(layer.post(p)) @ v)

    return naive.gap(layer(other)[:, :12], layer(x)[:, :12]), naive.gap(leaking(other)[:, :12], leaking(x)[:, :12])


@check("mta", "token-by-token decoding == prefill", below=1e-10, control="without the cache of queries")
def _() -> tuple[float, float]:
    layer = scramble(multi(rope=True))
    x = torch.randn(1, 19, 16, dtype=F64)

    def gap(keep: bool) -> float:
        state, outs = None, []
        for t in range(19):
            out, state = layer.step(x[:, t : t + 1], state)
            state.q = state.q if keep else state.q[:, :, :0]
            outs.append(out)
        return naive.gap(torch.cat(outs, 1), layer(x))

    return gap(True), gap(False)


@check("mta", "cq = 3, ck = 5: both convolutions in loops, and packed documents == each alone", below=1e-10, control="keys shifted by one")
def _() -> tuple[float, float]:
    layer = scramble(multi(norm=False, gate=False, pre_mix=0, post_mix=0))
    x = torch.randn(1, 11, 16, dtype=F64)
    q, k, v = layer.heads_of(x, 0)

    def convolved(s: Tensor, theta: Tensor, shift: int) -> Tensor:
        out = torch.zeros_like(s)
        for i in range(11):
            for j in range(11):
                for a in range(3):
                    for b in range(-2, 3):
                        if i - a >= 0 and 0 <= j + b + shift < 11:
                            out[i, j] += theta[2 - a, b + 2] * s[i - a, j + b + shift]
        return out

    def loops(shift: int) -> Tensor:
        heads = []
        past = torch.ones(11, 11, dtype=torch.bool).tril()
        for h in range(4):
            pre, post = layer.pre.weight[h, 0], layer.post.weight[h, 0]  # type: ignore[union-attr, index]
            s = convolved((q[0, h] @ k[0, h].T / 2).tril(), pre, shift)  # type: ignore[arg-type]
            p = s.masked_fill(~past, -torch.inf).softmax(-1)
            heads.append(convolved(p, post, shift).tril() @ v[0, h])  # type: ignore[arg-type]
        return layer.close(torch.stack(heads)[None])

    ids = (torch.arange(11) >= 6).long()[None]
    packed = layer(x, documents=ids)
    apart = torch.cat((layer(x[:, :6]), layer(x[:, 6:])), 1)
    return max(naive.gap(layer(x), loops(0)), naive.gap(packed, apart)), naive.gap(layer(x), loops(1))
