"""Checks of dma."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Window
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, rms, rotary, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
from regard.lab.verification import check
from regard.zoo.sparse.dma import BIASED, DynamicMaskAttention, top_lifetimes


def biased_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int, everywhere: bool = False) -> Tensor:
    """Row by row: the w largest biases among j <= i (or of the whole sequence), softmax with the bias."""
    group, rows = q.shape[1] // k.shape[1], []
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            b = bias[0, h // group]
            pool = b if everywhere else b[: i + 1]
            kept = [j for j in pool.topk(min(window, len(pool))).indices.tolist() if j <= i]
            s = k[0, h // group, kept] @ q[0, h, i] / math.sqrt(q.shape[-1]) + b[kept]
            rows.append(s.softmax(0) @ v[0, h // group, kept] if kept else torch.zeros_like(v[0, 0, 0]))
    return torch.stack(rows).reshape(1, q.shape[1], q.shape[2], -1)


@check("dma", "w >= L is causal attention with the bias, A = 0 plain causal attention", below=1e-12, control="w = L / 8")
def _() -> tuple[float, float]:
    q, k, v = qkv(128, 8, 4)
    bias = torch.randn(1, 4, 128, dtype=F64)
    causal = torch.ones(128, 128, dtype=torch.bool).tril()
    truth = (q @ k.transpose(-1, -2) / math.sqrt(8) + bias[:, :, None]).masked_fill(~causal, -math.inf).softmax(-1) @ v

    def gap(window: int) -> float:
        return naive.gap(attend(q, k, v, BIASED, bias=bias, until=top_lifetimes(bias, window)), truth)

    zero = naive.gap(attend(q, k, v, BIASED, bias=0 * bias, until=top_lifetimes(0 * bias, 128)), attend(q, k, v, mask=Causal()))
    return max(gap(128), zero), gap(16)


@check(
    "dma",
    "per-row top 16 of 128, grouped heads: equals a loop, with gradients of q, k, v and the bias",
    below=1e-10,
    control="one top 16 of the whole sequence",
)
def _() -> tuple[float, float]:
    leaves = [x.requires_grad_() for x in (*qkv(128, 8, 4, 2), torch.randn(1, 2, 128, dtype=F64))]
    q, k, v, bias = leaves
    until = top_lifetimes(bias, 16).repeat_interleave(2, 1)
    out, seed = attend(q, k, v, BIASED, bias=bias.repeat_interleave(2, 1), until=until), torch.randn(1, 4, 128, 8, dtype=F64)
    truth = biased_rows(q, k, v, bias, 16)
    pairs = zip(
        (out, *torch.autograd.grad((out * seed).sum(), leaves)), (truth, *torch.autograd.grad((truth * seed).sum(), leaves)), strict=True
    )
    return max(naive.gap(a, b) for a, b in pairs), naive.gap(out, biased_rows(q, k, v, bias, 16, True))


@check(
    "dma",
    "decoding with a cache of w keys equals the parallel form; it never holds more than w",
    below=1e-10,
    control="a cache that drops the oldest",
)
def _() -> tuple[float, float]:
    layer = DynamicMaskAttention(32, 4, 2, window=16).double()
    torch.nn.init.normal_(layer.strength)
    x = torch.randn(2, 60, 32, dtype=F64)
    with torch.no_grad():
        whole, state, outs, most = layer(x), None, [], 0
        for t in range(60):
            out, state = layer.step(x[:, t : t + 1], state)
            outs.append(out)
            most = max(most, state.bias.shape[-1])
        q, k, v, bias = layer.heads_of(x, 0)
        window = attend(q, k, v, BIASED, mask=Window(16), bias=bias.repeat_interleave(2, 1), until=torch.full((1, 1, 60), 60))
    oldest = layer.out(window.transpose(1, 2).flatten(-2))
    return naive.gap(torch.cat(outs, 1), whole) if most <= 16 else math.inf, naive.gap(oldest, whole)


@check("dma", "gradients of A and W_dt equal finite differences, and are not zero", below=1e-5, control="the bias detached")
def _() -> tuple[float, float]:
    layer = DynamicMaskAttention(16, 2, window=8, rope=False).double()
    torch.nn.init.normal_(layer.strength)
    x, seed = torch.randn(1, 24, 16, dtype=F64), torch.randn(1, 24, 16, dtype=F64)
    (layer(x) * seed).sum().backward()
    worst = least = 0.0
    for parameter in (layer.strength, layer.dt.weight):
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)  # type: ignore[union-attr]
        for at in range(min(4, len(flat))):
            values = []
            for sign in (1, -1):
                flat[at] += sign * 1e-6
                values.append(float((layer(x) * seed).sum()))
                flat[at] -= sign * 1e-6
            slope = (values[0] - values[1]) / 2e-6
            worst, least = max(worst, abs(slope - float(grad[at]))), max(least, abs(slope))
    return worst, least


def dma_loop(layer: DynamicMaskAttention, x: Tensor, of_keys: bool = False) -> Tensor:
    """The layer from its weights, row by row; of_keys: the bias read off keys, not values."""
    heads, share, n, at = layer.heads, layer.heads // layer.kv_heads, x.shape[1], torch.arange(x.shape[1])
    q = rotary(rms(split_heads(x @ layer.q.weight.T, heads), layer.q_norm.weight, 1e-6), at)
    k = rotary(rms(split_heads(x @ layer.k.weight.T, layer.kv_heads), layer.k_norm.weight, 1e-6), at)
    v = x @ layer.v.weight.T
    read = join_heads(k) if of_keys else v
    bias = layer.strength * torch.log1p(torch.exp(read @ layer.dt.weight.T + layer.dt.bias))  # (B, L, Hkv)
    bias = torch.exp(bias) if layer.form == "exp" else bias
    v, out = split_heads(v, layer.kv_heads), torch.zeros(*x.shape[:2], heads * layer.width, dtype=x.dtype)
    for b in range(x.shape[0]):
        for h in range(heads):
            g, rows = h // share, []
            for i in range(n):
                one = bias[b, : i + 1, g]
                if layer.kind == "relu":
                    kept = [j for j in range(i + 1) if one[j] > 0]
                else:
                    kept = sorted(range(i + 1), key=lambda j, one=one: -float(one[j]))[: layer.window]
                if layer.smooth:
                    sizes = {w: min(layer.smooth, n - w * layer.smooth) for w in range(-(-n // layer.smooth))}
                    most = {w for w, size in sizes.items() if sum(j // layer.smooth == w for j in kept) > size / 2}
                    kept = [j for j in range(i + 1) if j // layer.smooth in most]
                s = k[b, g, kept] @ q[b, h, i] / math.sqrt(layer.width) + one[kept]
                rows.append(s.softmax(0) @ v[b, g, kept] if kept else torch.zeros(layer.width, dtype=x.dtype))
            out[b, :, h * layer.width : (h + 1) * layer.width] = torch.stack(rows)
    return out @ layer.out.weight.T


@check(
    "dma",
    "the layer equals its formula by hand: bias A softplus(W v) or its exponential, norms and rotary of q and k, top w, bias > 0, blocks by majority",
    below=1e-10,
    control="the bias read off the keys",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, own = torch.randn(1, 30, 24, dtype=F64), 0.0
    for options in ({"bias": "exp"}, {"mask": "relu"}, {"smooth": 4}, {"smooth": 4, "mask": "relu", "bias": "exp"}, {"head_dim": 10}, {}):
        layer = DynamicMaskAttention(24, 4, 2, window=9, **options).double()  # type: ignore[arg-type]
        for p in (layer.strength, layer.q_norm.weight, layer.k_norm.weight):
            torch.nn.init.normal_(p)
        torch.nn.init.normal_(layer.dt.weight)
        own = max(own, naive.gap(layer(x), dma_loop(layer, x)))
    return own, naive.gap(layer(x), dma_loop(layer, x, True))
