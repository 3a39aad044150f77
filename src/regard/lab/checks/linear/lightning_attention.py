"""Checks of lightning-attention."""

from __future__ import annotations

import functools

import torch

from regard.algebra import Sizes
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, flops, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, silu, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.lightning_attention import layer_share
from regard.zoo.linear.lightning_attention_2 import lightning_blocks, minus_slopes


@check(
    "lightning-attention",
    "blocks of 16, N = 50, slopes 0, 0.1, 3, with gradients == the masked product",
    below=1e-9,
    control="powers one token late",
)
def _() -> tuple[float, float]:
    own, other, i = 0.0, 0.0, torch.arange(50, dtype=F64)
    for s in (0.0, 0.1, 3.0):
        leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(50, 8))
        slope = torch.full((2,), s, dtype=F64)
        past = torch.exp(-s * (i[:, None] - i).clamp_min(0)).tril()
        truth = (q @ k.mT * past) @ v
        out = lightning_blocks(q, k, v, slope, 16)[0]
        own = max(own, gap_with_gradients(out, truth, leaves))
        late = (q @ k.mT * torch.exp(-s * (i[:, None] - i + 1).clamp_min(0)).tril()) @ v
        other = max(other, naive.gap(out, late))
    return own, other


@check("lightning-attention", "two calls with the carried state == one", below=1e-10, control="without the state")
def _() -> tuple[float, float]:
    q, k, v = qkv(90)
    slope = torch.tensor([0.05, 0.4], dtype=F64)
    whole, last = lightning_blocks(q, k, v, slope)
    first, state = lightning_blocks(*[x[:, :, :37] for x in (q, k, v)], slope, 16)
    rest = [x[:, :, 37:] for x in (q, k, v)]
    second, end = lightning_blocks(*rest, slope, 16, state)
    lost = lightning_blocks(*rest, slope, 16)[0]
    return max(naive.gap(torch.cat((first, second), 2), whole), naive.gap(end, last)), naive.gap(lost, whole[:, :, 37:])


@check("lightning-attention", "operations a token at N = 4096 over those at N = 1024", below=1.01, control="the masked product")
def _() -> tuple[float, float]:
    def cost(executor: str) -> float:
        found = []
        for n in (1024, 4096):
            q, k, v = (torch.randn(1, 1, n, 32) for _ in range(3))
            found.append(flops(functools.partial(attend, q, k, v, "lightning-attention-2", executor=executor)) / n)
        return found[1] / found[0]

    return cost("chunk"), cost("parallel")


@check(
    "lightning-attention",
    "slopes of 8 heads in layer 2 of 5 == 2^(-h) (1 - 2/4 + 1e-5); the layer's gate has the given rank",
    below=1e-6,
    control="slopes of layer 0",
)
def _() -> tuple[float, float]:
    sizes = Sizes(1, 8, 8, 4, 4, 8, 8)
    truth = -torch.tensor([2.0**-h * (0.5 + 1e-5) for h in range(1, 9)])
    layer = Attention(64, 8, get("lightning-attention", layer=2, layers=5, gate_rank=8))
    rank = float(layer.gate[0].out_features != 8)  # type: ignore[index, union-attr]
    own = naive.gap(minus_slopes(sizes, layer_share(2, 5)), truth)
    return max(own, rank, naive.gap(layer.inputs.fixed_log_decay, truth)), naive.gap(minus_slopes(sizes), truth)  # type: ignore[arg-type]


@check(
    "lightning-attention",
    "the layer with either norm == its formula by hand: silu of q, k and v, a norm over all heads, a sigmoid gate of low rank",
    below=1e-9,
    control="the norm a head",
)
def _() -> tuple[float, float]:
    x, i, gaps, other = torch.randn(2, 9, 16, dtype=F64), torch.arange(9, dtype=F64), [], 1e9
    for norm in ("srms", "layer"):
        layer = Attention(16, 2, get("lightning-attention", layer=1, layers=3, gate_rank=5, norm=norm))
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (16, 16) for name in ("q", "k", "v", "out")}
        shapes |= {"gate.0.weight": (5, 16), "gate.1.weight": (16, 5)}
        gaps.append(misshapen(layer, shapes | ({"merge_norm.weight": (16,), "merge_norm.bias": (16,)} if norm == "layer" else {})))
        layer = drawn(layer)
        q, k, v = (silu(split(y(x), 2)) for y in (layer.q, layer.k, layer.v))
        rate = torch.tensor([2.0**-4, 2.0**-8], dtype=F64) * (0.5 + 1e-5)
        past = torch.exp(-rate[:, None, None] * (i[:, None] - i).clamp_min(0)).tril()
        o = joined((q @ k.mT * past) @ v)
        assert layer.gate is not None
        gate = torch.sigmoid(layer.gate[1](layer.gate[0](x)))  # type: ignore[index, operator]
        if norm == "layer":
            y = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            y = y * layer.merge_norm.weight + layer.merge_norm.bias  # type: ignore[operator]
        else:
            y = rms(o, 1e-6)
        gaps.append(naive.gap(layer(x), layer.out(y * gate)))
        other = min(other, naive.gap(layer(x), layer.out(joined(rms(split(o, 2), 1e-6)) * gate)))
    return max(gaps), other
