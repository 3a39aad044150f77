"""Checks of based."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Recurrent, Rope
from regard.algebra.feature_map import taylor, taylor_packed
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, misshapen, short_conv, silu, split
from regard.lab.checks.shared.recurrent import forms, qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.based import GatedConv, based_mixers


@check("based", "phi(q).phi(k) = 1 + s + s^2/2, packed and full", below=1e-12, control="without the quadratic term")
def _() -> tuple[float, float]:
    q, k, _ = qkv(30, 16)
    s = q @ k.transpose(-1, -2) / 4
    truth = 1 + s + s * s / 2
    own = max(naive.gap(phi(q) @ phi(k).transpose(-1, -2), truth) for phi in (taylor, taylor_packed))
    return own, naive.gap(1 + s, truth)


def taylor_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of 1 + s + s^2 / 2, s = q.k / sqrt(D), over their sums, up to each token."""
    s = q @ k.mT / math.sqrt(q.shape[-1])
    w = (1 + s + s * s / 2).tril()
    return w / w.sum(-1, keepdim=True) @ v


@check("based", "recurrent == chunked == parallel, and equals a token loop", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv(37)
    truth = taylor_rows(q, k, v)
    own = 0.0
    for packed in (False, True):
        mechanism = get("based", packed=packed)
        assert isinstance(mechanism, Recurrent)
        own = max([own, *[naive.gap(out, truth) for out in forms(mechanism, q, k, v)]])
    return own, naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


def recall(feature: Callable[[Tensor], Tensor], d: int, pairs: int, seeds: int = 10) -> float:
    """Training-free associative recall: share of queried keys whose nearest value is the one stored."""
    right = 0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        keys = F.normalize(torch.randn(pairs, d, generator=generator, dtype=F64), dim=-1) * 1.5 * math.sqrt(d)
        values = F.normalize(torch.randn(pairs, 32, generator=generator, dtype=F64), dim=-1)
        a = feature(keys) @ feature(keys).T
        read = (a @ values) / a.sum(-1, keepdim=True).clamp_min(1e-12)
        right += int(((read @ values.T).argmax(-1) == torch.arange(pairs)).sum())
    return right / (seeds * pairs)


@check("based", "training-free recall of 64 pairs, d' = 16", above=0.95, control="ReLU linear attention")
def _() -> tuple[float, float]:
    return recall(taylor, 16, 64), recall(torch.relu, 16, 64)


@check("based", "the state-size dial: recall of 256 pairs at d' = 32", above=0.9, control="d' = 16")
def _() -> tuple[float, float]:
    dial = [recall(taylor, d, 256, 4) for d in (8, 16, 24, 32)]
    return dial[3] if dial == sorted(dial) else 0.0, dial[1]


@check("based", "divided by the sum plus eps, by a sum of at least eps, or by nothing", below=1e-12, control="by the sum alone")
def _() -> tuple[float, float]:
    q, k, v = qkv(20)
    s = q @ k.mT / math.sqrt(8)
    w = (1 + s + s * s / 2).tril()
    total, own, other = w.sum(-1, keepdim=True), [], []
    for divide, divisor in (("add", total + 3.0), ("sum", total.clamp_min(30.0)), ("none", torch.ones_like(total))):
        out = attend(q, k, v, get("based", divide=divide, eps=30.0 if divide == "sum" else 3.0), mask=Causal())
        own.append(naive.gap(out, w @ v / divisor))
        other.append(naive.gap(out, w @ v / total))
    return max(own), min(other)


@check(
    "based",
    "the layer, the window partner and the gated convolution == their formulas by hand; of five mixers one is linear, one a window",
    below=1e-10,
    control="the convolution's branches swapped",
)
def _() -> tuple[float, float]:
    x, i = torch.randn(2, 9, 16, dtype=F64), torch.arange(9)
    mixers = based_mixers(9, 16, 2, feature_dim=4, window=3)
    kinds = [type(mixer) for mixer in mixers] == [
        GatedConv,
        Attention,
        GatedConv,
        Attention,
        GatedConv,
        GatedConv,
        Attention,
        GatedConv,
        Attention,
    ]
    conv, linear, window = drawn(mixers[0]), drawn(mixers[1]), drawn(mixers[3])
    assert isinstance(conv, GatedConv) and isinstance(linear, Attention) and isinstance(window, Attention)
    shapes: dict[str, tuple[int, ...]] = {"q.weight": (8, 16), "k.weight": (8, 16), "v.weight": (16, 16), "out.weight": (16, 16)}
    bad = misshapen(linear, shapes) + misshapen(
        conv, {"conv.weight": (16, 1, 3), **{f"{n}.weight": (16, 16) for n in ("left", "right", "out")}}
    )
    q, k, v = (split(y(x), 2) for y in (linear.q, linear.k, linear.v))
    gaps = [bad, 0.0 if kinds else math.inf, naive.gap(linear(x), linear.out(joined(taylor_rows(q, k, v))))]
    q, k, v = (split(y(x), 2) for y in (window.q, window.k, window.v))
    q, k = Rope().rotate(q, i), Rope().rotate(k, i)
    hidden = (i[:, None] < i) | (i[:, None] - i >= 3)
    read = (q @ k.mT / math.sqrt(8)).masked_fill(hidden, -math.inf).softmax(-1) @ v
    gaps.append(naive.gap(window(x), window.out(joined(read))))
    left, right = x @ conv.left.weight.T, x @ conv.right.weight.T
    gaps.append(naive.gap(conv(x), (silu(short_conv(left, conv.conv.weight)) * right) @ conv.out.weight.T))
    return max(gaps), naive.gap(conv(x), (short_conv(left, conv.conv.weight) * silu(right)) @ conv.out.weight.T)


@check(
    "based",
    "numbers of the state a channel of v: (D' + 1)(D' + 2) / 2 packed, 1 + D' + D'^2 else; misses",
    below=0,
    control="the other form's",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(3, 16, 5)

    def width(packed: bool) -> int:
        return int(step(q, k, v, get("based", packed=packed))[1].s.shape[-2])  # type: ignore[union-attr]

    return abs(width(True) - 153) + abs(width(False) - 273), abs(width(True) - 273) + abs(width(False) - 153)
