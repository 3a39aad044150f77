"""Checks of fixed-head-size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.verification import check
from regard.zoo.analysis.fixed_head_size import FixedHeadMHA, attention_of, low_rank_bottleneck


def pattern(n: int = 16, dim: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, dim, generator=generator, dtype=F64), (3 * torch.randn(n, n, generator=generator, dtype=F64)).softmax(-1)


@check(
    "fixed-head-size",
    "head as wide as the sequence (16), and wider: error of the closed form on a random pattern",
    below=1e-10,
    control="head size 12, fitted",
)
def _() -> tuple[float, float]:
    x, target = pattern()
    found = [low_rank_bottleneck(x, target, size) for size in (16, 20)]
    again = max(naive.gap(attention_of(x, one.wq, one.wk), target) for one in found)
    return max(again, *[one.error for one in found]), low_rank_bottleneck(x, target, 12, steps=150).error


@check("fixed-head-size", "head size 4 of 16 tokens: the best fit's largest error", above=0.05, control="head size 16")
def _() -> tuple[float, float]:
    x, target = pattern()
    four, two = low_rank_bottleneck(x, target, 4, steps=1200), low_rank_bottleneck(x, target, 2, steps=1200)
    return four.error if two.error > four.error else 0.0, low_rank_bottleneck(x, target, 16).error


@check(
    "fixed-head-size",
    "head size d / h with biases: values and gradients of nn.MultiheadAttention, both causal and not",
    below=1e-10,
    control="one head of the same width",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for causal in (False, True):
        own, torch_s = FixedHeadMHA(24, 4, 6, causal=causal, bias=True).to(F64), nn.MultiheadAttention(24, 4, batch_first=True).to(F64)
        one = FixedHeadMHA(24, 1, 24, causal=causal, bias=True).to(F64)
        with torch.no_grad():
            torch_s.in_proj_bias.normal_()
            torch_s.out_proj.bias.normal_()
            for layer in (own, one):
                for name, weight, bias in zip("qkv", torch_s.in_proj_weight.chunk(3), torch_s.in_proj_bias.chunk(3), strict=True):
                    getattr(layer, name).weight.copy_(weight)
                    getattr(layer, name).bias.copy_(bias)
                layer.out.weight.copy_(torch_s.out_proj.weight)
                layer.out.bias.copy_(torch_s.out_proj.bias)
        x = torch.randn(2, 7, 24, dtype=F64, requires_grad=True)
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
        truth = torch_s(x, x, x, attn_mask=hidden, need_weights=False)[0]
        gaps.append(gap_with_gradients(own(x), truth, (x,)))
        others.append(naive.gap(one(x), truth))
    return max(gaps), min(others)


@check(
    "fixed-head-size",
    "5 heads of 7 channels over 12: loops, parameters 4 d h d_h, steps of one token, cached numbers 2 h d_h a token",
    below=1e-10,
    control="scores over sqrt(d / h)",
)
def _() -> tuple[float, float]:
    layer, x = FixedHeadMHA(12, 5, 7, causal=True).to(F64), torch.randn(2, 6, 12, dtype=F64)
    truths = []
    for scale in (7**-0.5, (12 / 5) ** -0.5):
        outs = torch.zeros(2, 6, 35, dtype=F64)
        for h in range(5):
            at = slice(7 * h, 7 * h + 7)
            q, k, v = (x @ getattr(layer, name).weight[at].T for name in "qkv")
            for i in range(6):
                p = (torch.einsum("bd,bjd->bj", q[:, i], k[:, : i + 1]) * scale).softmax(-1)
                outs[:, i, at] = torch.einsum("bj,bjd->bd", p, v[:, : i + 1])
        truths.append(outs @ layer.out.weight.T)
    state, steps = None, []
    for t in range(6):
        y, state = layer.step(x[:, t : t + 1], state)
        steps.append(y)
    sizes = sum(p.numel() for p in layer.parameters()) == 4 * 12 * 5 * 7 and state is not None and state.bytes == 2 * 6 * 2 * 5 * 7 * 8
    own = max(naive.gap(layer(x), truths[0]), naive.gap(torch.cat(steps, 1), truths[0]))
    return own if sizes else 1.0, naive.gap(layer(x), truths[1])
