"""Checks of Lightning Attention, TransNormer and TransNormerLLM."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from ...algebra import Causal, FeatureMap, Recurrent, Rope, Sizes
from ...catalog import get
from ...engine import attend
from ...mechanisms.recurrent.lightning import layer_share, lightning_blocks, minus_slopes
from ...mechanisms.recurrent.transnormer import diagonal, transnormer_layers
from ...nn import Attention
from .. import naive
from ..verification import check
from .comparing import F64, gap_with_gradients, streamed
from .weighted import qkv


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


@check("lightning-attention", "time a token at N = 8192 over that at N = 1024", below=1.5, control="the masked product")
def _() -> tuple[float, float]:
    def cost(name: str) -> float:
        found = []
        for n in (1024, 8192):
            q, k, v = (torch.randn(1, 2, n, 64) for _ in range(3))
            runs = []
            for _ in range(4):
                start = time.perf_counter()
                attend(q, k, v, "lightning-attention-2", executor=name)
                runs.append(time.perf_counter() - start)
            found.append(min(runs) / n)
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
    "transnormer", "largest gradient of keys x c: growth from c = 1e-8 to 1e-11", below=10, control="linear attention divided by its sum"
)
def _() -> tuple[float, float]:
    q, k, v = (x.abs() for x in qkv(32))
    seed = torch.randn(1, 2, 32, 5, dtype=F64)

    def growth(normed: bool) -> float:
        found = []
        for c in (1e-8, 1e-11):
            leaf = (c * k).requires_grad_()
            base = get("transnormer") if normed else Recurrent(readout="sum", eps=0.0, scaled=False)
            assert isinstance(base, Recurrent)
            out = attend(q, leaf, v[..., :5], replace(base, feature=FeatureMap(torch.relu)))
            found.append(float(torch.autograd.grad((out * seed).sum(), leaf)[0].abs().max()))
        return found[1] / found[0]

    return growth(True), growth(False)


@check(
    "transnormer",
    "both directions and causal, with gradients == x / (rms + eps) of the sums; streams too",
    below=1e-9,
    control="divided by its sum",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(50))
    own, other = 0.0, math.inf
    for causal in (False, True):
        w = torch.where(q > 0, q + 1, torch.exp(q)) @ torch.where(k > 0, k + 1, torch.exp(k)).mT
        w = w.tril() if causal else w
        x = w @ v
        truth = x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        out = attend(q, k, v, "transnormer", mask=Causal() if causal else None)
        own = max(own, gap_with_gradients(out, truth, leaves))
        other = min(other, naive.gap(out, x / w.sum(-1, keepdim=True)))
        if causal:
            own = max(own, naive.gap(streamed("transnormer", q, k, v), truth))
    return own, other


@check("transnormer", "DiagAttention: Jacobian across blocks of 16; the model has it in its first half", below=0, control="NormAttention")
def _() -> tuple[float, float]:
    q, k, v = qkv(48)
    layers = transnormer_layers(4, "T2", 16)
    if layers != [diagonal(16)] * 2 + [get("transnormer")] * 2:
        return math.nan, math.nan
    other = v.clone()
    other[:, :, :16] += 1
    found = [
        naive.gap(attend(q, k, other, m)[:, :, 16:], attend(q, k, v, m)[:, :, 16:])
        for m in (diagonal(16), diagonal(16, "rela"), layers[-1])
    ]
    return max(found[:2]), found[2]


def lrpe_product(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, rate: Tensor) -> Tensor:
    """sum_s lambda^(t-s) (sum_c q_tc k_sc cos(theta_c (t - s))) v_s in loops over pairs."""
    n = q.shape[2]
    out = torch.zeros_like(v)
    for t in range(n):
        for s in range(t + 1):
            w = (q[:, :, t] * k[:, :, s] * torch.cos(theta * (t - s))).sum(-1) * torch.exp(rate * (t - s))
            out[:, :, t] += w[..., None] * v[:, :, s]
    return out


@check(
    "transnormerllm",
    "cosines and decay: chunks, steps and the matrix == loops over pairs",
    below=1e-10,
    control="a rotation of channel pairs",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(40)
    theta, rate = torch.rand(2, 8, dtype=F64), -torch.tensor([0.3, 0.05], dtype=F64)
    mechanism = get("transnormerllm")
    truth = lrpe_product(q, k, v, theta, rate)
    found = [attend(q, k, v, mechanism, executor=e, theta=theta, log_decay=rate) for e in ("chunk", "parallel", "step")]
    found.append(streamed(mechanism, q, k, v, theta=theta, log_decay=rate))
    at = torch.arange(40)
    turned = attend(Rope().rotate(q, at), Rope().rotate(k, at), v, "lightning-attention-2", log_decay=rate)
    return max(naive.gap(x, truth) for x in found), naive.gap(turned, truth)


@check(
    "transnormerllm",
    "float32, T = 4096, lambda = 1/2: relative distance from float64",
    below=1e-4,
    control="a recurrence with factors lambda^-s",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 4096, 16) for _ in range(3))
    rate = torch.full((2,), math.log(0.5))
    mechanism = get("transnormerllm", layer=1, layers=2)
    truth = attend(q.double(), k.double(), v.double(), mechanism, log_decay=rate.double())
    size = truth.abs().max()
    t = torch.arange(4096.0)[:, None]
    raw = torch.exp(rate[0] * t) * (q @ ((k * torch.exp(-rate[0] * t)).mT[..., :, :, None] * v[:, :, None]).cumsum(-2)[:, :, :, -1])
    naive_gap = float((raw - truth).abs().max() / size)
    own = max(naive.gap(attend(q, k, v, mechanism, executor=e, log_decay=rate) / size, truth / size) for e in ("chunk", "step"))
    return own, naive_gap if math.isfinite(naive_gap) else math.inf


@check("transnormerllm", "v x 1000 changes the layer by", below=1e-3, control="without the norm")
def _() -> tuple[float, float]:
    layer = Attention(32, 4, "transnormerllm")
    bare = Attention(32, 4, replace(get("transnormerllm"), recipe=replace(layer.recipe, merge_norm="")))  # type: ignore[type-var]
    bare.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, 32)

    def change(layer: Attention) -> float:
        before = layer(x)
        layer.v.weight.data.mul_(1000)
        return naive.gap(layer(x), before)

    return change(layer), change(bare)


@check(
    "transnormerllm",
    "decays: the first head of layer 0 forgets fastest, the last layer keeps all: largest log decay there",
    below=1e-4,
    control="in layer 0",
)
def _() -> tuple[float, float]:
    rates = [Attention(64, 8, get("transnormerllm", layer=layer, layers=4)).inputs.fixed_log_decay for layer in range(4)]
    truth = torch.stack([-torch.tensor([2.0**-h * (1 - layer / 3 + 1e-5) for h in range(1, 9)]) for layer in range(4)])
    same = naive.gap(torch.stack(rates), truth)  # type: ignore[arg-type]
    falling = bool((rates[0].diff() > 0).all())  # type: ignore[union-attr, operator]
    return max(same, float(rates[3].abs().max())) if falling else math.inf, float(rates[0].abs().max())  # type: ignore[union-attr, operator]
