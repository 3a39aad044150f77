"""Checks of recurrences with gates, slots and spans: EFLA, Lightning, TransNormer(LLM), ReGLA, LightNet, GSA, NHA, log-linear attention."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, FeatureMap, Mechanism, Padding, Recurrent, Rope, Sizes
from ...catalog import get
from ...engine import attend, step
from ...engine.recurrent import levels
from ...mechanisms.recurrent.efla import exact
from ...mechanisms.recurrent.lightning import layer_share, lightning_blocks, minus_slopes
from ...mechanisms.recurrent.regla import refined, safe_query
from ...mechanisms.recurrent.transnormer import diagonal, transnormer_layers
from ...nn import Attention, Decoder
from .. import naive
from ..verification import check
from .grids import gap_with_gradients
from .weighted import qkv

F64 = torch.float64


def streamed(mechanism: str | Mechanism, q: Tensor, k: Tensor, v: Tensor, cuts: tuple[int, ...] = (1, 2, 30), **inputs: Tensor) -> Tensor:
    """The outputs of a stream that takes tokens in pieces ending at `cuts` and at the end; inputs with a length are cut along."""
    edges, state, outs = [0, *cuts, q.shape[2]], None, []
    for a, b in itertools.pairwise(edges):
        part = {name: x[:, :, a:b] if x.dim() > 2 else x for name, x in inputs.items()}
        out, state = step(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mechanism, state, **part)
        outs.append(out)
    return torch.cat(outs, 2)


@check("efla", "one token == the matrix exponential of its differential equation", below=1e-12, control="DeltaNet's Euler step")
def _() -> tuple[float, float]:
    k, v, s, beta = torch.randn(6, dtype=F64), torch.randn(4, dtype=F64), torch.randn(6, 4, dtype=F64), 0.7
    system = torch.zeros(10, 10, dtype=F64)  # of [S; the constant v^T as 4 more rows]
    system[:6, :6], system[:6, 6:] = -torch.outer(k, k), torch.outer(k, torch.ones(4, dtype=F64))
    moved = torch.linalg.matrix_exp(beta * system)
    truth = moved[:6, :6] @ s + torch.stack([moved[:6, 6:] @ (F.one_hot(torch.tensor(c), 4).to(F64) * v[c]) for c in range(4)], -1)

    def one(strength: float) -> Tensor:
        return s - strength * torch.outer(k, k @ s) + strength * torch.outer(k, v)

    alpha = float(exact(torch.tensor(beta, dtype=F64), k.square().sum()))
    return naive.gap(one(alpha), truth), naive.gap(one(beta), truth)


def delta_loop(q: Tensor, k: Tensor, v: Tensor, strength: Tensor) -> tuple[Tensor, float]:
    """(outputs, the largest norm of the state) of the delta rule a token at a time, scores times D^-1/2."""
    state, outs, most = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=k.dtype), [], 0.0
    for t in range(k.shape[2]):
        kt, vt, a = k[:, :, t], v[:, :, t], strength[:, :, t, None, None]
        state = state - a * kt[..., None] * (kt[..., None, :] @ state) + a * kt[..., None] * vt[..., None, :]
        outs.append((q[:, :, t, None, :] @ state)[..., 0, :] * q.shape[-1] ** -0.5)
        most = max(most, float(state.detach().norm(dim=(-2, -1)).max()))
    return torch.stack(outs, 2), most


@check("efla", "chunks with gradients, and streams == the token loop, keys of any length", below=1e-9, control="beta itself (DeltaNet)")
def _() -> tuple[float, float]:
    q, k, v = qkv(70)
    leaves = q, k, v, beta = tuple(x.requires_grad_() for x in (q, k, v, torch.rand(1, 2, 70, dtype=F64)))
    square = k.square().sum(-1)
    truth = delta_loop(q, k, v, (1 - torch.exp(-beta * square)) / square)[0]
    out = attend(q, k, v, "efla", beta=beta)
    own = max(gap_with_gradients(out, truth, leaves), naive.gap(streamed("efla", q, k, v, beta=beta), truth))
    return own, naive.gap(out, delta_loop(q, k, v, beta)[0])


@check("efla", "|k|^2 = 9, beta = 1, 200 tokens: largest norm of the state", below=20, control="DeltaNet")
def _() -> tuple[float, float]:
    q, k, v = qkv(200)
    k, one = 3 * F.normalize(k, dim=-1), torch.ones(1, 2, 200, dtype=F64)
    alpha = exact(one, k.square().sum(-1))
    out = attend(q, k, v, "efla", beta=one)
    loop, size = delta_loop(q, k, v, alpha)
    return (size if naive.gap(out, loop) < 1e-8 else math.inf), delta_loop(q, k, v, one)[1]


@check("efla", "unit keys: DeltaNet with 1 - exp(-beta); |k|^2 = 1e-12: alpha is beta", below=1e-9, control="keys of length 1.5")
def _() -> tuple[float, float]:
    q, k, v = qkv(50)
    k, beta = F.normalize(k, dim=-1), torch.rand(1, 2, 50, dtype=F64)

    def miss(k: Tensor) -> float:
        return naive.gap(attend(q, k, v, "efla", beta=beta), attend(q, k, v, "deltanet", beta=1 - torch.exp(-beta)))

    tiny = exact(beta, torch.full_like(beta, 1e-12)) / beta
    return max(miss(k), naive.gap(tiny, torch.ones_like(tiny))), miss(1.5 * k)


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


@check("regla", "200000 draws, m = 64: |log std(a sum_d exp(q_d + k_d))|", below=0.05, control="without a")
def _() -> tuple[float, float]:
    q, k = torch.randn(2, 200000, 64, dtype=F64)

    def miss(scaled: bool) -> float:
        factor = safe_query(q[:1], scaled) / safe_query(q[:1], False)
        return abs(math.log(float((factor[:, :1] * torch.exp(q + k).sum(-1)).std())))

    return miss(True), miss(False)


def regla_loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rescale: bool = True) -> Tensor:
    """The recurrence with the largest key so far, the state rescaled whenever it grows; without the variance factor."""
    state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=k.dtype)
    top, outs = torch.full((*k.shape[:2], 1, 1), -math.inf, dtype=k.dtype), []
    for t in range(k.shape[2]):
        new = torch.maximum(top, k[:, :, t].amax(-1)[..., None, None])
        state = state * (torch.exp(top - new) if rescale else 1.0) * gate[:, :, t, :, None]
        state = state + torch.exp(k[:, :, t, :, None] - new) * v[:, :, t, None, :]
        phi = torch.exp(q[:, :, t] - q[:, :, t].amax(-1, keepdim=True))
        outs.append((phi[..., None, :] @ state)[..., 0, :])
        top = new
    return torch.stack(outs, 2)


@check(
    "regla",
    "chunks, matrix and streams == the loop, with a key of +30 at the end; its last row is the form with the global maximum",
    below=1e-8,
    control="without rescaling the state",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(60)
    k[:, :, -1, 0] += 30
    gate = torch.rand(1, 2, 60, 8, dtype=F64)
    mechanism = get("regla", scaled=False)
    truth = regla_loop(q, k, v, gate)
    found = [attend(q, k, v, mechanism, executor=e, log_decay=gate.log()) for e in ("chunk", "parallel")]
    found.append(streamed(mechanism, q, k, v, log_decay=gate.log()))
    total = gate.log().cumsum(2)
    pairs = torch.exp(total[:, :, -1:] - total) * torch.exp(k - k.amax((-1, -2), keepdim=True))
    last = (torch.exp(q[:, :, -1:] - q[:, :, -1:].amax(-1, keepdim=True)) * pairs).sum(-1)[:, :, None] @ v
    gaps = [naive.gap(x, truth) for x in found] + [naive.gap(found[0][:, :, -1:], last)]
    return max(gaps), naive.gap(regla_loop(q, k, v, gate, rescale=False), truth)


@check("regla", "the refined gate at g = 0.999, r = 0: its slope over the sigmoid's", above=1.99, control="at r = 1/2")
def _() -> tuple[float, float]:
    g, r = torch.rand(2, 10000, dtype=F64)
    found = refined(g, r)
    inside = bool(((found >= g * g - 1e-15) & (found <= 2 * g - g * g + 1e-15)).all()) and naive.gap(refined(g, 0 * r + 0.5), g) < 1e-12

    def slope(r: float) -> float:
        logit = torch.tensor(math.log(0.999 / 0.001), dtype=F64, requires_grad=True)
        gate = torch.sigmoid(logit)
        return float(torch.autograd.grad(refined(gate, torch.tensor(r, dtype=F64)), logit)[0] / (0.999 * 0.001))

    return slope(0.0) if inside else math.nan, slope(0.5)


def lightnet_sum(q: Tensor, f: Tensor, v: Tensor) -> Tensor:
    """sum_s e^{f_s - z_t} v_s, one row at a time."""
    rows = []
    for t in range(q.shape[2]):
        share = torch.softmax(f[:, :, : t + 1], 2)  # e^{f_s - z_t}
        rows.append((F.silu(q[:, :, t])[..., None, :] @ (share.mT @ v[:, :, : t + 1]))[..., 0, :] * q.shape[-1] ** -0.5)
    return torch.stack(rows, 2)


@check(
    "lightnet",
    "chunks, matrix and streams with gradients == the explicit sum; logits of +-200 too",
    below=1e-9,
    control="gates that multiply",
)
def _() -> tuple[float, float]:
    leaves = q, f, v = tuple(x.requires_grad_() for x in qkv(70))
    out = attend(q, f, v, "lightnet", mask=Causal())
    own = gap_with_gradients(out, lightnet_sum(q, f, v), leaves)
    wild = torch.where(torch.rand_like(f) > 0.5, 200.0, -200.0).to(F64)
    truth = lightnet_sum(q, wild, v)
    own = max(own, naive.gap(attend(q, wild, v, "lightnet", mask=Causal()), truth), naive.gap(streamed("lightnet", q, wild, v), truth))
    gated = attend(F.silu(q), torch.sigmoid(f), v, "gla", log_decay=F.logsigmoid(f))
    return own, naive.gap(gated, lightnet_sum(q, f, v))


@check(
    "lightnet",
    "without a mask: permuting positions permutes the output, and it is the last causal state read by all",
    below=1e-12,
    control="GLA in both directions",
)
def _() -> tuple[float, float]:
    q, f, v = qkv(30)
    at = torch.randperm(30)
    moved = [x[:, :, at] for x in (q, f, v)]
    out = attend(q, f, v, "lightnet")
    last = attend(q[:, :, -1:], f, v, "lightnet", mask=Causal())
    gate = {"log_decay": F.logsigmoid(f)}
    both = attend(q, f, v, "gla", **gate)
    turned = attend(*moved, "gla", log_decay=F.logsigmoid(moved[1]))  # type: ignore[misc]
    own = max(naive.gap(attend(*moved, "lightnet"), out[:, :, at]), naive.gap(last, out[:, :, -1:]))  # type: ignore[misc]
    return own, naive.gap(turned, both[:, :, at])


@check("lightnet", "relative cosines on a 5 x 6 grid: moving q and k alike changes their product by", below=1e-10, control="moving k alone")
def _() -> tuple[float, float]:
    from ...mechanisms.recurrent.lightnet import relative_cosines

    x, y, theta = torch.randn(1, 2, 1, 8, dtype=F64), torch.randn(1, 2, 1, 8, dtype=F64), torch.rand(2, 8, 2, dtype=F64)

    def product(a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        one, two = (relative_cosines(z, torch.tensor([p[0] * 6 + p[1]]), theta, (5, 6)) for z, p in ((x, a), (y, b)))
        return (one * two).sum(-1)

    truth = (x * y * torch.cos(theta @ torch.tensor([2.0, -3.0], dtype=F64))[:, None]).sum(-1)
    first = product((3, 1), (1, 4))
    return max(naive.gap(first, product((2, 0), (0, 3))), naive.gap(first, truth)), naive.gap(first, product((3, 1), (2, 4)))


@check("lightnet", "padding on the left: outputs equal those without it, gradients are finite", below=1e-10, control="padding not masked")
def _() -> tuple[float, float]:
    q, f, v = qkv(30)
    keep = (torch.arange(30) >= 9)[None]
    leaves = tuple(x.clone().requires_grad_() for x in (q, f, v))
    out = attend(*leaves, "lightnet", mask=Causal() & Padding(), keep=keep)  # type: ignore[misc]
    grads = torch.autograd.grad(out.square().sum(), leaves)
    truth = attend(q[:, :, 9:], f[:, :, 9:], v[:, :, 9:], "lightnet", mask=Causal())
    bad = math.inf if not all(bool(g.isfinite().all()) for g in grads) else 0.0
    return max(bad, naive.gap(out[:, :, 9:], truth)), naive.gap(attend(q, f, v, "lightnet", mask=Causal())[:, :, 9:], truth)


def slot_loop(q: Tensor, k: Tensor, v: Tensor, f: Tensor, s: Tensor, window: int = 0, scale: float = 1.0, arrival: bool = False) -> Tensor:
    """Slots and window a token at a time: written when a token leaves the window (or, wrongly, on arrival)."""
    b, h, n, d = q.shape
    out = torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype)
    for at in [(x, y) for x in range(b) for y in range(h)]:
        keys, values = torch.zeros(f.shape[-1], d, dtype=q.dtype), torch.zeros(f.shape[-1], v.shape[-1], dtype=q.dtype)
        for t in range(n):
            e = t if arrival else t - window
            if e >= 0:
                keys = f[at][e][:, None] * keys + s[at][e][:, None] * k[at][e]
                values = f[at][e][:, None] * values + s[at][e][:, None] * v[at][e]
            start = max(0, t - window + 1) if window else t + 1
            one = torch.cat((keys, k[at][start : t + 1])) if e >= 0 else k[at][start : t + 1]
            two = torch.cat((values, v[at][start : t + 1])) if e >= 0 else v[at][start : t + 1]
            out[at][t] = torch.softmax(scale * one @ q[at][t], 0) @ two
    return out


def slot_inputs(n: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *qkv(n), -strength * torch.rand(1, 2, n, 6, dtype=F64)


@check(
    "gsa",
    "two chained scans with gradients, and streams == the recurrence, with weak and strong gates",
    below=1e-7,
    control="writes of strength 1",
)
def _() -> tuple[float, float]:
    own = []
    for strength in (0.3, 60.0):
        leaves = q, k, v, g = tuple(x.requires_grad_() for x in slot_inputs(90, strength))
        truth = slot_loop(q, k, v, g.exp(), 1 - g.exp())
        out = attend(q, k, v, "gsa", log_forget=g)
        own += [gap_with_gradients(out, truth, leaves), naive.gap(streamed("gsa", q, k, v, log_forget=g), truth)]
    other = attend(q, k, v, "gsa", log_forget=g, write=torch.ones_like(g))
    return max(own), naive.gap(other, truth)


@check(
    "gsa",
    "one-hot writes to as many slots as tokens, unwritten ones left out == causal softmax",
    below=1e-12,
    control="softmax over two tokens a slot",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(12)
    truth = attend(q, k, v, mask=Causal(), scale=1.0)

    def last_row(slots: int) -> float:
        write = F.one_hot(torch.arange(12) % slots, slots).to(F64).expand(1, 2, -1, -1)
        out = attend(q, k, v, "gsa", log_forget=torch.zeros_like(write), write=write)
        return naive.gap(out[:, :, -1], truth[:, :, -1])  # all slots are written by then

    return last_row(12), last_row(6)


@check("gsa", "gates from sums (ABC): K is each slot's softmax average of keys", below=1e-10, control="without the running divisor")
def _() -> tuple[float, float]:
    q, k, v = qkv(50)
    s = 3 * torch.randn(1, 2, 50, 6, dtype=F64)
    mechanism = get("gsa", gates="sum")
    rows: list[Tensor] = []
    other: list[Tensor] = []
    for t in range(50):
        for share, to in ((torch.softmax(s[:, :, : t + 1], 2), rows), (torch.exp(s[:, :, : t + 1]), other)):
            keys, values = share.mT @ k[:, :, : t + 1], share.mT @ v[:, :, : t + 1]
            to.append(torch.softmax(keys @ q[:, :, t, :, None], -2).mT @ values)
    truth = torch.cat(rows, 2)
    own = max(naive.gap(attend(q, k, v, mechanism, write=s), truth), naive.gap(streamed(mechanism, q, k, v, write=s), truth))
    return own, naive.gap(torch.cat(other, 2), truth)


@check(
    "gsa",
    "a decoder of gated slots generates the tokens that full passes would; bytes of its state at 40 and 80 tokens differ by",
    below=0,
    control="softmax's",
)
def _() -> tuple[float, float]:
    def grown(mechanism: str | Mechanism) -> float:
        model = Decoder(mechanism, vocab=20, dim=32, layers=2, heads=2)
        prompt = torch.randint(20, (1, 40))
        out = model.generate(prompt, 3)
        full = model(out[:, :-1])[:, 39:].argmax(-1)
        if not torch.equal(full, out[:, 40:]):
            return math.nan
        sizes = [sum(s.bytes for s in model.step(torch.randint(20, (1, n)))[1]) for n in (40, 80)]
        return float(sizes[1] - sizes[0])

    return grown(get("gsa", slots=8)), grown("softmax")


@check("nha", "w = 8 with gradients, and streams == the loop", below=1e-9, control="tokens written on arrival")
def _() -> tuple[float, float]:
    leaves = q, k, v, g = tuple(x.requires_grad_() for x in slot_inputs(40))
    mechanism = get("nha", window=8, rope=None)
    truth = slot_loop(q, k, v, g.exp(), 1 - g.exp(), 8, 8**-0.5)
    out = attend(q, k, v, mechanism, log_forget=g)
    own = max(gap_with_gradients(out, truth, leaves), naive.gap(streamed(mechanism, q, k, v, log_forget=g), truth))
    return own, naive.gap(out, slot_loop(q, k, v, g.exp(), 1 - g.exp(), 8, 8**-0.5, arrival=True))


@check("nha", "w >= length is causal softmax attention, w = 0 gated slots", below=1e-12, control="w = 8 for both")
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(40)
    full = attend(q, k, v, mask=Causal())
    slots = attend(q, k, v, get("gsa", scaled=True), log_forget=g)

    def out(window: int) -> Tensor:
        return attend(q, k, v, get("nha", window=window, rope=None), log_forget=g)

    return max(naive.gap(out(40), full), naive.gap(out(0), slots)), min(naive.gap(out(8), full), naive.gap(out(8), slots))


@check(
    "nha",
    "what a value inside the window gives: softmax's share of the window, times what the slots leave",
    below=1e-9,
    control="softmax's share alone",
)
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(40)
    v.requires_grad_()
    out = attend(q, k, v, get("nha", window=8, rope=None), log_forget=g)
    got = torch.autograd.grad(out[0, 0, 30, 0], v)[0][0, 0, 23:31, 0]
    near = 8**-0.5 * k[0, 0, 23:31] @ q[0, 0, 30]
    keys = torch.zeros(6, 8, dtype=F64)
    for e in range(23):
        keys = g[0, 0, e].exp()[:, None] * keys + (1 - g[0, 0, e].exp())[:, None] * k[0, 0, e]
    far = 8**-0.5 * keys @ q[0, 0, 30]
    left = near.logsumexp(0).exp() / (near.logsumexp(0).exp() + far.logsumexp(0).exp())
    return naive.gap(got, left * near.softmax(0)), naive.gap(got, near.softmax(0))


def spans(base: str, n: int = 37) -> tuple[Mechanism, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    inputs = {"log_decay": -torch.rand(1, 2, n, dtype=F64), "level_scales": torch.rand(1, 2, n, 7, dtype=F64)}
    if base == "gated-delta":
        k, inputs["beta"] = F.normalize(k, dim=-1), torch.rand(1, 2, n, dtype=F64)
    return get("log-linear-attention", base=base), q, k, v, inputs


def span_sums(q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor], level: str = "fenwick") -> Tensor:
    """Each pair's product of transitions, times its level's scale, in loops over t and j."""
    n = q.shape[2]
    out = torch.zeros_like(v)
    for t in range(n):
        moved = q[:, :, t]  # q_t^T times the transitions after j
        for j in range(t, -1, -1):
            at = (t ^ j).bit_length() if level == "fenwick" else (t - j).bit_length()
            beta = inputs["beta"][:, :, j, None] if "beta" in inputs else 1.0
            w = (moved * k[:, :, j]).sum(-1, keepdim=True) * beta * inputs["level_scales"][:, :, t, at, None]
            out[:, :, t] += w * v[:, :, j]
            if "beta" in inputs:
                moved = moved - beta * (moved * k[:, :, j]).sum(-1, keepdim=True) * k[:, :, j]
            moved = moved * torch.exp(inputs["log_decay"][:, :, j, None])
    return out


@check(
    "log-linear-attention",
    "Mamba-2 and gated delta: the matrix, chunks of 8 and of 64, streams == loops over pairs",
    below=1e-10,
    control="levels by distance",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        truth = span_sums(q, k, v, inputs)
        scan, scales = levels.prepared(mechanism, Causal(), q, k, v, None, inputs, 0)  # type: ignore[arg-type]
        found = [levels.parallel(scan, scales), levels.chunked(scan, scales, 8)[0], attend(q, k, v, mechanism, **inputs)]
        found.append(streamed(mechanism, q, k, v, (20, 21, 36), **inputs))
        own += [naive.gap(x, truth) for x in found]
        other.append(naive.gap(found[0], span_sums(q, k, v, inputs, "distance")))
    return max(own), min(other)


@check("log-linear-attention", "gradients of chunks of 8 == those of the matrix", below=1e-9, control="one scale for all levels")
def _() -> tuple[float, float]:
    own = []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        leaves = tuple(x.requires_grad_() for x in (q, k, v, *inputs.values()))
        (scan, scales), again = (levels.prepared(mechanism, Causal(), q, k, v, None, inputs, 0) for _ in range(2))  # type: ignore[arg-type]
        own.append(gap_with_gradients(levels.chunked(scan, scales, 8)[0], levels.parallel(*again), leaves))
    flat = scales.mean(-1, keepdim=True).expand_as(scales)
    return max(own), naive.gap(levels.chunked(scan, flat, 8)[0], levels.parallel(scan, scales))


@check("log-linear-attention", "scales of one == the recurrence itself", below=1e-12, control="random scales")
def _() -> tuple[float, float]:
    own, other = [], []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        plain = attend(q, k, v, mechanism.inner, **{name: x for name, x in inputs.items() if name != "level_scales"})  # type: ignore[attr-defined]
        ones = {**inputs, "level_scales": torch.ones_like(inputs["level_scales"])}
        own.append(naive.gap(attend(q, k, v, mechanism, **ones), plain))
        other.append(naive.gap(attend(q, k, v, mechanism, **inputs), plain))
    return max(own), min(other)


@check(
    "log-linear-attention",
    "states alive after each of 100 tokens, less popcount(t) + 1: the largest miss",
    below=0,
    control="less bit_length(t) + 1",
)
def _() -> tuple[float, float]:
    mechanism, q, k, v, inputs = spans("mamba2", 100)
    inputs["level_scales"] = torch.rand(1, 2, 100, 9, dtype=F64)
    state, own, other = None, 0, 0
    for t in range(100):
        part = {name: x[:, :, t : t + 1] for name, x in inputs.items()}
        _, state = step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], mechanism, state, **part)
        alive = sum(x is not None for x in state.levels)  # type: ignore[union-attr]
        own, other = max(own, abs(alive - t.bit_count() - 1)), max(other, abs(alive - t.bit_length() - 1))
    return own, other


@check("log-linear-attention", "growth of time from 2048 to 8192 tokens, a doubling", below=2.8, control="the matrix")
def _() -> tuple[float, float]:
    def cost(run: str) -> float:
        found = []
        for n in (2048, 8192):
            q, k, v = (torch.randn(1, 1, n, 32) for _ in range(3))
            inputs = {"log_decay": -0.1 * torch.rand(1, 1, n), "level_scales": torch.rand(1, 1, n, 14)}
            scan, scales = levels.prepared(get("log-linear-attention"), Causal(), q, k, v, None, inputs, 0)  # type: ignore[arg-type]
            runs = []
            for _ in range(3):
                start = time.perf_counter()
                (levels.chunked if run == "chunked" else levels.parallel)(scan, scales)
                runs.append(time.perf_counter() - start)
            found.append(min(runs))
        return (found[1] / found[0]) ** 0.5

    return cost("chunked"), cost("matrix")
