"""Checks of weights that are functions of whole rows: nap, Self-Adjust, re-weighted softplus, clipped softmax."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Padding, Weighted, softmax_plus
from ...catalog import get
from ...engine import attend, step, weights
from ...nn import Attention
from ...nn.parts import HeadGate
from .. import naive
from ..experiments.sinks import trained
from ..verification import check
from .weighted import identity_values, qkv, weights_of

F64 = torch.float64


def nap_row(s: Tensor, gain: float = 1.3, shift: float = 0.2) -> Tensor:
    mean = s.sum() / len(s)
    return gain * (s - mean) / (math.sqrt(((s - mean) ** 2).sum() / len(s)) + 1e-3) + shift


@check(
    "nap", "n = 33 with 9 padded keys == a loop over rows, and == the unpadded call", below=1e-12, control="statistics over padded keys too"
)
def _() -> tuple[float, float]:
    q, k, v = qkv(33)
    keep = torch.arange(33)[None] < 24
    given = {"gain": torch.tensor(1.3, dtype=F64), "shift": torch.tensor(0.2, dtype=F64)}
    padded = attend(q, k, v, "nap", mask=Padding(), keep=keep, **given)
    truth = naive.attention(q, k[:, :, :24], v[:, :, :24], nap_row, scale=1.0)
    whole = attend(q, k, v * keep[0, :, None], "nap", **given)
    short = attend(q, k[:, :, :24], v[:, :, :24], "nap", **given)
    return max(naive.gap(padded, truth), naive.gap(padded, short)), naive.gap(whole, truth)


@check("nap", "rows have mean b_h and standard deviation g_h", below=1e-3, control="softmax rows")
def _() -> tuple[float, float]:
    s = 3 * torch.randn(20, 40, dtype=F64)

    def off(name: str, **given: Tensor) -> float:
        w = weights_of(s, name, **given)
        return max(float((w.mean(-1) - 0.2).abs().max()), float((w.std(-1, correction=0) - 1.3).abs().max()))

    return off("nap", gain=torch.tensor(1.3, dtype=F64), shift=torch.tensor(0.2, dtype=F64)), off("softmax")


@check("nap", "values in [0, 1], gain 3: largest excursion of outputs from [0, 1]", above=0.1, control="softmax stays in the hull")
def _() -> tuple[float, float]:
    q, k, _ = qkv(33)
    v = torch.rand(1, 2, 33, 8, dtype=F64)

    def outside(out: Tensor) -> float:
        return float(torch.maximum(-out, out - 1).max())

    return outside(attend(q, k, v, "nap", gain=torch.tensor(3.0, dtype=F64))), outside(attend(q, k, v, "softmax"))


@check(
    "nap",
    "logits * 0.1: spread over queries of LayerNorm(output) stays within 20% from n = 16 to 1024",
    below=1.2,
    control="softmax's output fades like n^-1/2",
)
def _() -> tuple[float, float]:
    def ratio(name: str, norm: bool) -> float:
        spreads = []
        for n in (16, 1024):
            s, v = 0.1 * torch.randn(n, n, dtype=F64), torch.randn(1, 1, n, 64, dtype=F64)
            out = attend(s[None, None], identity_values(n), v, name, scale=1.0)
            out = F.layer_norm(out, (64,)) if norm else out
            spreads.append(float(out.std(-2).mean()))
        return max(spreads) / min(spreads)

    return ratio("nap", True), ratio("softmax", False)


def sa_row(variant: str, c_den: float = 1e-10) -> naive.RowWeights:
    def row(s: Tensor) -> Tensor:
        p = naive.softmax(s)
        if variant == "v1":
            return s * p
        low = min(float(s.min()), 0.0)
        return p * (s - low) / (max(0.0, float(s.max())) - low + c_den)

    return row


@check("sa-softmax", "v1 and v2 == a loop over rows, causal", below=1e-12, control="plain softmax")
def _() -> tuple[float, float]:
    q, k, v = qkv(29, std=1.5)
    gaps = [
        naive.gap(attend(q, k, v, get("sa-softmax", variant=x), mask=Causal()), naive.attention(q, k, v, sa_row(x), naive.causal))
        for x in ("v1", "v2")
    ]
    return max(gaps), naive.gap(attend(q, k, v, "softmax", mask=Causal()), naive.attention(q, k, v, sa_row("v2"), naive.causal))


@check(
    "sa-softmax",
    "logits [20, 0 x 15]: |d w_max / d x_max| of v1 is within 0.1 of 1",
    below=0.1,
    control="plain softmax, whose gradient vanishes",
)
def _() -> tuple[float, float]:
    def slope(name: str | Weighted) -> float:
        s = torch.zeros(1, 16, dtype=F64)
        s[0, 0] = 20
        s.requires_grad_()
        (grad,) = torch.autograd.grad(weights_of(s, name)[0, 0], s)
        return abs(float(grad[0, 0]))

    return abs(slope(get("sa-softmax", variant="v1")) - 1), abs(slope("softmax") - 1)  # type: ignore[arg-type]


@check("sa-softmax", "v2: 0 <= w <= softmax, and w = softmax at the largest logit", below=1e-9, control="v1")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(30, 20, dtype=F64)
    p = s.softmax(-1)
    top = s.argmax(-1, keepdim=True)

    def off(variant: str) -> float:
        w = weights_of(s, get("sa-softmax", variant=variant))
        return max(float(-w.min()), float((w - p).max()), naive.gap(w.gather(-1, top), p.gather(-1, top)))

    return off("v2"), off("v1")


def lssar_row(n: int, i: int, cosines: Tensor, d: int, p: float) -> Tensor:
    s = torch.log1p(torch.exp(math.log(d) * math.log(n) * cosines))
    a = s / (s.sum() + 1e-8)
    r = (n * a - (0.0 if i < 3 else 1.0)).clamp_min(0) ** p
    return r / (r.sum() + 1e-8)


@check("lssar", "causal == a loop over rows, the first three included", below=1e-10, control="the global length in place of the row's")
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)

    def truth(length: bool) -> Tensor:
        out = torch.zeros_like(v)
        for h in range(2):
            for i in range(23):
                w = lssar_row(23 if length else i + 1, i, unit_k[0, h, : i + 1] @ unit_q[0, h, i], 8, 15.0)
                out[0, h, i] = w @ v[0, h, : i + 1]
        return out

    out = attend(q, k, v, "lssar", mask=Causal())
    return naive.gap(out, truth(False)), naive.gap(out, truth(True))


@check(
    "lssar",
    "weight on a key equal to the query among n - 1 random ones, least over n = 1k, 4k, 16k (D = 64)",
    above=0.99,
    control="softmax",
)
def _() -> tuple[float, float]:
    def needle(name: str) -> float:
        found = []
        for n in (1024, 4096, 16384):
            k = torch.randn(1, 1, n, 64, dtype=F64)
            at_seven = (torch.arange(n) == 7).to(F64)[None, None, :, None]
            found.append(float(attend(k[:, :, 7:8], k, at_seven, name)))
        return min(found)

    return needle("lssar"), needle("softmax")


@check("lssar", "token-by-token decoding == prefill", below=1e-10, control="every row told the final length")
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    whole, state, outs = attend(q, k, v, "lssar", mask=Causal()), None, []
    for t in range(23):
        out, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], "lssar", state)
        outs.append(out)
    frozen = attend(q, k, v, "lssar", mask=lambda b, h, i, j: j <= 22)
    return naive.gap(torch.cat(outs, 2), whole), naive.gap(frozen, whole)


@check("clipped-softmax", "keys with softmax <= alpha / (T + alpha): largest weight and gradient", below=0.0, control="plain softmax")
def _() -> tuple[float, float]:
    s = 1.5 * torch.randn(20, 32, dtype=F64)
    low = s.softmax(-1) <= 4 / 36

    def largest(name: str) -> float:
        x = s.clone().requires_grad_()
        w = weights_of(x, name)
        (grad,) = torch.autograd.grad(w[low].sum(), x)
        w = w.detach()
        return max(float(w[low].abs().max()), float(grad.abs().max()))

    return largest("clipped-softmax"), largest("softmax")


@check(
    "clipped-softmax",
    "T = 32, alpha = 4, logits [5, 0 x 31]: w_1 = 1.125 p_1 - 0.125 = 0.8057, others 0",
    below=1e-4,
    control="plain softmax",
)
def _() -> tuple[float, float]:
    s = torch.zeros(1, 32, dtype=F64)
    s[0, 0] = 5

    def off(name: str) -> float:
        w = weights_of(s, name)[0]
        return max(abs(float(w[0]) - 0.80569), float(w[1:].max()))

    return off("clipped-softmax"), off("softmax")


@check(
    "clipped-softmax",
    "a gate at its fine-tuning start (weights N(0, 0.001^2), times 1 / pi) leaves the layer as it was",
    below=1e-2,
    control="without the factor",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 17, 32, dtype=F64)
    layer = Attention(32, 4, get("clipped-softmax", gamma=0.0, out_gate="head")).double()
    plain = Attention(32, 4, "softmax").double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    truth = plain(x)

    def gap(factor: float) -> float:
        layer.head_gate = HeadGate(32, 4, "head", 0.25, factor, std=1e-3).double()
        return naive.gap(layer(x), truth) / float(truth.detach().abs().max())

    return gap(4.0), gap(1.0)


@check(
    "clipped-softmax",
    "tiny copy task, two seeds: mean logit range (max - min) over that of softmax, accuracies >= 0.95",
    below=0.85,
    control="softmax with a sink logit",
)
def _() -> tuple[float, float]:
    def spread(mechanism: str | Weighted) -> float:
        runs = [trained(mechanism, seed) for seed in (0, 1)]
        return sum(run.logit_range for run in runs) if min(run.accuracy for run in runs) >= 0.95 else math.inf

    plain = spread("softmax")
    return spread(get("clipped-softmax")) / plain, spread(Weighted(normalizer=softmax_plus())) / plain  # type: ignore[arg-type]


@check("clipped-softmax", "weights of the layer's mechanism equal clip(...) of its softmax, causal", below=1e-12, control="unclipped")
def _() -> tuple[float, float]:
    q, k, _ = qkv(32)
    p = weights(q, k, "softmax", mask=Causal())
    w = weights(q, k, "clipped-softmax", mask=Causal())
    assert p is not None and w is not None
    seen = torch.ones(32, 32, dtype=torch.bool).tril()
    raw = (1 + 4 / 32) * p - 4 / 32
    return naive.gap(w, raw.clamp(0, 1) * seen), naive.gap(w, raw * seen)
