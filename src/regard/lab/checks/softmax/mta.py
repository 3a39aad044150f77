"""Checks of mta."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax.mta import MultiTokenAttention


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
