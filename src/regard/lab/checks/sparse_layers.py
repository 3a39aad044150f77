"""Checks of trained sparse layers: DMA, NAtS, SLA, MoSA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Window
from ...engine import attend
from ...nn.dynamic_mask import BIASED, DynamicMaskAttention, top_lifetimes
from ...nn.lifetimes import GLOBAL, LOCAL, MASKED, SLIDING, NAtSAttention, NAtSCache, cache_size, surrogate, type_lifetimes
from ...nn.mosa import MoSA, dense_flops, rotate_part, sparse_flops
from ...nn.sparse_linear import SparseLinearAttention, block_classes
from .. import naive
from ..planted import autoregressive
from ..verification import check
from .selected import qkv

F64 = torch.float64


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


@check(
    "nats",
    "masked form equals a loop over the three lifetimes, and the surrogate with one-hot types",
    below=1e-12,
    control="local tokens dropped one step early",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(2, 2, 96, 8, dtype=F64) for _ in range(3))
    types = torch.randint(3, (2, 2, 96))
    types[0, 0][types[0, 0] == GLOBAL] = LOCAL

    def loop(early: int) -> Tensor:
        keep = torch.zeros(2, 2, 96, 96, dtype=torch.bool)
        for b in range(2):
            for h in range(2):
                for j in range(96):
                    following = next((g for g in range(j, 96) if types[b, h, g] == GLOBAL), 96)
                    for i in range(j, 96):
                        kind = int(types[b, h, j])
                        keep[b, h, i, j] = (
                            kind == GLOBAL or (kind == LOCAL and (i <= following - early or i == j)) or (kind == SLIDING and i <= j + 8)
                        )
        return (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~keep, -math.inf).softmax(-1) @ v

    out = attend(q, k, v, MASKED, until=type_lifetimes(types, 8))
    soft = surrogate(q, k, v, F.one_hot(types, 3).to(F64), 8)
    return max(naive.gap(out, loop(0)), naive.gap(soft, loop(0))), naive.gap(out, loop(1))


@check(
    "nats",
    "decoding with the evicting cache equals the masked form, its sizes the formula's, grouped heads",
    below=1e-10,
    control="a cache that keeps everything",
)
def _() -> tuple[float, float]:
    layer = NAtSAttention(32, 4, 2, window=8).double().eval()
    x = torch.randn(2, 96, 32, dtype=F64)
    with torch.no_grad():
        whole, _ = layer(x)
        types = layer.heads_of(x)[3].argmax(-1)
        expected, cache, outs, wrong = cache_size(types, 8), NAtSCache([], [], [], []), [], 0
        for t in range(96):
            out, cache = layer.step(x[:, t : t + 1], cache)
            outs.append(out)
            wrong += sum(a != b for a, b in zip(cache.sizes(), expected[..., t].flatten().tolist(), strict=True))
    return naive.gap(torch.cat(outs, 1), whole) + wrong, float(96 * 4 - sum(cache.sizes()))


@check("nats", "all tokens global is dense causal attention, all sliding a window of W + 1 keys", below=1e-12, control="a window of W")
def _() -> tuple[float, float]:
    q, k, v = qkv(96)
    every = torch.zeros(1, 2, 96, dtype=torch.long)
    dense = naive.gap(attend(q, k, v, MASKED, until=type_lifetimes(every + GLOBAL, 8)), attend(q, k, v, mask=Causal()))
    sliding = attend(q, k, v, MASKED, until=type_lifetimes(every + SLIDING, 8))
    gaps = [naive.gap(sliding, attend(q, k, v, mask=Causal() & Window(size))) for size in (9, 8)]
    return max(dense, gaps[0]), gaps[1]


@check("nats", "gradients of the surrogate in soft types equal finite differences", below=1e-5, control="types detached")
def _() -> tuple[float, float]:
    q, k, v = qkv(24, 8, 1)
    logits, seed = torch.randn(1, 1, 24, 3, dtype=F64, requires_grad=True), torch.randn(1, 1, 24, 8, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        return (surrogate(q, k, v, x.softmax(-1), 4) * seed).sum()

    (grad,) = torch.autograd.grad(loss(logits), logits)
    slopes = torch.zeros_like(grad)
    for at in range(72):
        bump = torch.zeros(72, dtype=F64)
        bump[at] = 1e-6
        bump = bump.reshape(grad.shape)
        slopes.view(-1)[at] = (loss(logits + bump) - loss(logits - bump)).detach() / 2e-6
    return naive.gap(grad, slopes), float(slopes.abs().max())


def three_classes(layer: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, drop: bool = False) -> Tensor:
    """SLA token by token: critical keys by softmax, marginal ones by features; drop: no linear part."""
    feature = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}[layer.feature]
    critical, marginal = block_classes(q, k, 16, layer.top, layer.bottom)
    rows = []
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            kinds = [(critical[0, h, i // 16, j // 16], marginal[0, h, i // 16, j // 16] or layer.over == "all") for j in range(k.shape[2])]
            near, far = [j for j, (c, _) in enumerate(kinds) if c], [j for j, (_, m) in enumerate(kinds) if m]
            o = (k[0, h, near] @ q[0, h, i] / math.sqrt(q.shape[-1])).softmax(0) @ v[0, h, near] if near else torch.zeros_like(v[0, h, 0])
            linear = torch.zeros_like(o)
            if far:
                w = feature(k[0, h, far]) @ feature(q[0, h, i])
                linear = w @ v[0, h, far] / (w.sum() + (1e-5 if layer.over == "all" else 0))
            rows.append(o if drop else o + layer.linear(linear))
    return torch.stack(rows).reshape(q.shape)


@check(
    "sla",
    "output and gradients of q, k, v, W_l equal a three-class loop, both variants and three feature maps",
    below=1e-9,
    control="marginal blocks dropped",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for over, feature in (("marginal", "softmax"), ("marginal", "elu"), ("marginal", "relu"), ("all", "softmax")):
        q, k, v = (x.requires_grad_() for x in qkv(112, 16, 1))
        layer = SparseLinearAttention(16, 0.25, 0.125, block_size=16, feature=feature, over=over).double()
        torch.nn.init.normal_(layer.linear.weight)
        leaves, seed = (q, k, v, layer.linear.weight), torch.randn(1, 1, 112, 16, dtype=F64)
        out, truth = layer(q, k, v), three_classes(layer, q, k, v)
        pairs = zip(
            (out, *torch.autograd.grad((out * seed).sum(), leaves)),
            (truth, *torch.autograd.grad((truth * seed).sum(), leaves)),
            strict=True,
        )
        own = max(own, *(naive.gap(a, b) for a, b in pairs))
        other = max(other, naive.gap(out, three_classes(layer, q, k, v, True)))
    return own, other


@check(
    "sla",
    "at the start it is the sparse part; top = 1 is dense attention; top = bottom = 0 linear attention",
    below=1e-10,
    control="top = 0.25 against dense",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(256, 16, 2)
    truth = attend(q, k, v)
    start = SparseLinearAttention(16, 0.25, 0.125, block_size=16).double()
    dense = SparseLinearAttention(16, 1.0, 0.0, block_size=16).double()
    linear = SparseLinearAttention(16, 0.0, 0.0, block_size=16).double()
    torch.nn.init.eye_(linear.linear.weight)
    torch.nn.init.eye_(dense.linear.weight)
    w = q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)
    own = max(
        naive.gap(start(q, k, v), start.branches(q, k, v)[0]),
        naive.gap(dense(q, k, v), truth),
        naive.gap(linear(q, k, v), w / w.sum(-1, keepdim=True) @ v),
    )
    return own, naive.gap(start(q, k, v), truth)


@check(
    "sla",
    "slowly drifting tokens, W_l fitted to the dense output: error over the sparse part's, the worst of 3 seeds",
    below=0.7,
    control="the sparse part",
)
def _() -> tuple[float, float]:
    ratios, own, alone = [], [], []

    def fitted(base: Tensor, features: Tensor, truth: Tensor) -> float:
        x = F.pad(features.flatten(0, 2), (0, 1), value=1.0)
        weight = torch.linalg.lstsq(x, (truth - base).flatten(0, 2)).solution
        return float((base.flatten(0, 2) + x @ weight - truth.flatten(0, 2)).norm() / truth.norm())

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (autoregressive(256, 16, 0.9, generator)[None, None] for _ in range(3))
        q, k, v = 1.2 * q, 1.2 * k, v + 0.7
        truth = attend(q, k, v)
        sparse, linear = SparseLinearAttention(16, 0.25, 0.125, block_size=16).branches(q, k, v)
        whole = SparseLinearAttention(16, 0.0, 0.0, block_size=16).branches(q, k, v)[1]
        own.append(fitted(sparse, linear, truth))
        alone.append(fitted(torch.zeros_like(truth), whole, truth))
        ratios.append(own[-1] / float((sparse - truth).norm() / truth.norm()))
    return max(ratios) if sum(own) < sum(alone) else math.inf, 1.0


def mosa_loop(layer: MoSA, x: Tensor, token_choice: bool = False) -> Tensor:
    """Each head: its k best tokens, rotary positions of the original places, causal by them, scaled and added back."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        scores = torch.sigmoid(x[b] @ layer.router.T)  # (T, E)
        for e in range(layer.sparse):
            taken = sorted(scores[:, e].topk(layer.taken(x.shape[1])).indices.tolist())
            if token_choice:
                taken = [t for t in range(x.shape[1]) if int(scores[t].argmax()) == e] or [0]
            at = torch.tensor(taken)
            q, k, v = (x[b, at] @ layer.qkv[n, e] for n in range(3))
            q, k = rotate_part(q, at, 0.5), rotate_part(k, at, 0.5)
            for n, t in enumerate(taken):
                p = (k[: n + 1] @ q[n] / math.sqrt(layer.head_dim)).softmax(0)
                out = out.index_put((torch.tensor(b), torch.tensor(t)), scores[t, e] * (p @ v[: n + 1]) @ layer.out[e], accumulate=True)
    return out


@check("mosa", "sparsity 1 is causal multi-head attention with rows scaled by the router", below=1e-10, control="rows not scaled")
def _() -> tuple[float, float]:
    layer, x = MoSA(16, 3, head_dim=8, sparsity=1).double(), torch.randn(2, 24, 16, dtype=F64)
    q, k, v = (torch.einsum("btd,edh->beth", x, w) for w in layer.qkv)
    at = torch.arange(24)
    o = attend(rotate_part(q, at, 0.5), rotate_part(k, at, 0.5), v, mask=Causal())
    r = torch.sigmoid(x @ layer.router.T).transpose(1, 2)[..., None]
    outs = [torch.einsum("beth,ehd->btd", y, layer.out) for y in (r * o, o)]
    return naive.gap(layer(x), outs[0]), naive.gap(layer(x), outs[1])


@check("mosa", "T = 24, k = 6: equals a loop over heads, with the router's gradient", below=1e-10, control="tokens choose heads")
def _() -> tuple[float, float]:
    layer, x = MoSA(16, 3, head_dim=8, sparsity=4).double(), torch.randn(2, 24, 16, dtype=F64)
    out, truth, seed = layer(x), mosa_loop(layer, x), torch.randn(2, 24, 16, dtype=F64)
    grads = [torch.autograd.grad((y * seed).sum(), (layer.router, layer.qkv, layer.out)) for y in (out, truth)]
    return max(naive.gap(out, truth), *(naive.gap(a, b) for a, b in zip(*grads, strict=True))), naive.gap(out, mosa_loop(layer, x, True))


@check("mosa", "rows that no head has chosen are zero: largest entry", below=0, control="chosen rows")
def _() -> tuple[float, float]:
    layer, x = MoSA(16, 2, head_dim=8, sparsity=6).double(), torch.randn(1, 24, 16, dtype=F64)
    places = layer.chosen(torch.sigmoid(torch.einsum("btd,ed->bet", x, layer.router))).flatten().unique()
    free = torch.ones(24, dtype=torch.bool)
    free[places] = False
    out = layer(x)[0].detach()
    return float(out[free].abs().max()), float(out[~free].abs().amax(-1).min())


@check("mosa", "FLOPs of a head at k = T / 8, counted from the tensors of the loop, over a dense head's", below=1 / 7, control="k = T / 2")
def _() -> tuple[float, float]:
    dim, width, length = 64, 16, 512

    def counted(k: int) -> int:
        products = [(k, dim, width)] * 3 + [(k, width, k), (k, k, width), (k, width, dim)]
        return sum(2 * a * b * c for a, b, c in products) + 2 * dim * length + width * k

    assert counted(64) == sparse_flops(dim, width, 64, length)
    return tuple(counted(k) / dense_flops(dim, width, length) for k in (64, 256))  # type: ignore[return-value]
