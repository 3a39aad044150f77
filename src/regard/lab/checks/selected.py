"""Checks of the selected rows: Sparse Transformer, MoBA, Routing Transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...algebra import Causal, Mask, Selection
from ...algebra.part import Sizes
from ...catalog import get
from ...engine import attend, step
from ...engine.composed import formed
from ...engine.problem import indices, view_of
from ...mechanisms.selected.routing import update_centroids
from ...mechanisms.selected.sparse_transformer import patterns
from ...nn import RoutingAttention, SparseBlock
from .. import naive
from ..verification import check

F64 = torch.float64


def qkv(n: int, d: int = 8, heads: int = 2, kv: int | None = None, m: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    kv = kv or heads
    return torch.randn(1, heads, n, d, dtype=F64), torch.randn(1, kv, m or n, d, dtype=F64), torch.randn(1, kv, m or n, d, dtype=F64)


def spelled(mask: Mask, n: int, heads: int = 1) -> Tensor:
    """A mask as an (n, n) matrix (of head 0)."""
    at = indices(Sizes(1, heads, heads, n, n, 1, 1), torch.device("cpu"))
    seen = mask.visible(at["b"], at["h"], at["i"], at["j"], {"k_len": n, "offset": 0})
    return seen.expand(1, heads, n, n)[0, 0]


def selection_of(selector: Any, q: Tensor, k: Tensor, mask: Mask | None = None, **inputs: Tensor) -> Selection:
    """What a selector chooses for scaled q and k, under Causal() unless another mask is given."""
    sizes = Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], q.shape[3])
    return selector.select(q * q.shape[3] ** -0.5, k, view_of(mask or Causal(), sizes, inputs, q.device))


@check(
    "sparse-transformer",
    "masks equal the set definitions, n = 144, l = 12 (strided) and c = 3 (fixed): differing pairs",
    below=0,
    control="window of l keys",
)
def _() -> tuple[float, float]:
    n, stride, c = 144, 12, 3
    i, j = torch.arange(n)[:, None], torch.arange(n)
    sets = {
        "strided": ((j <= i) & (j >= i - stride), (j <= i) & ((i - j) % stride == 0)),
        "fixed": ((j <= i) & (j // stride == i // stride), (j <= i) & (j % stride >= stride - c)),
    }
    wrong = sum(
        int((spelled(mask, n) != truth).sum())
        for name, pair in sets.items()
        for mask, truth in zip(patterns(name, stride, c), pair, strict=True)
    )
    return float(wrong), float(((j <= i) & (j > i - stride) != sets["strided"][0]).sum())


@check("sparse-transformer", "two hops over A1 | A2 reach every earlier key: share of the causal triangle", above=1.0, control="A1 alone")
def _() -> tuple[float, float]:
    n, stride = 144, 12
    triangle = torch.ones(n, n, dtype=F64).tril() > 0

    def reach(mask: Tensor) -> float:
        a = mask.to(F64)
        return float((((a @ a) > 0) & triangle).sum() / triangle.sum())

    unions = [patterns(name, stride, 3) for name in ("strided", "fixed")]
    degree = max(float((spelled(a | c, n)).sum(-1).max()) for a, c in unions[:1])
    own = min(reach(spelled(a | c, n)) for a, c in unions)
    return own if degree <= 2 * stride + n / stride else 0.0, max(reach(spelled(a, n)) for a, _ in unions)


@check(
    "sparse-transformer",
    "block-sparse runs equal dense attention under the token mask, outputs and gradients, merged, heads, interleaved",
    below=1e-10,
    control="dense causal attention",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(144))
    first, second = (spelled(mask, 144) for mask in patterns("fixed", 12, 3))
    masks = {"merged": (first | second).expand(2, -1, -1), "heads": torch.stack((first, second)), "interleaved": second.expand(2, -1, -1)}
    own, other = 0.0, math.inf
    for mode, mask in masks.items():
        out = attend(q, k, v, get("sparse-transformer", stride=12, count=3, integration=mode, layer=1))
        s = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, -math.inf)
        truth = torch.where(mask.any(-1, keepdim=True), s.softmax(-1).nan_to_num(0.0), 0.0) @ v
        live = mask.any(-1)[None, ..., None].to(F64)
        grads = [torch.autograd.grad((o * live).square().sum(), (q, k, v), retain_graph=True) for o in (out, s_attend(q, k, v, mask))]
        own = max(own, naive.gap(out, truth), *[naive.gap(a, c) for a, c in zip(*grads, strict=True)])
        other = min(other, naive.gap(out, attend(q, k, v, "softmax", mask=Causal())))
    return own, other


def s_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dense softmax under an explicit mask, a loop over rows (empty rows are zero)."""
    rows = []
    for i in range(q.shape[2]):
        heads = []
        for h in range(q.shape[1]):
            at = mask[h, i].nonzero().squeeze(1)
            p = (k[0, h, at] @ q[0, h, i] / math.sqrt(q.shape[-1])).softmax(0) if at.numel() else None
            heads.append(v.new_zeros(v.shape[-1]) if p is None else p @ v[0, h, at])
        rows.append(torch.stack(heads))
    return torch.stack(rows, 1)[None]


@check(
    "sparse-transformer",
    "recomputation: saved tensors over the size of the input, gradients identical",
    below=5.0,
    control="the stored path",
)
def _() -> tuple[float, float]:
    x = torch.randn(1, 96, 32, dtype=F64)
    saved: dict[bool, int] = {}
    grads = {}
    for recompute in (True, False):
        torch.manual_seed(0)
        block = SparseBlock(32, 2, get("sparse-transformer", stride=12, count=3), recompute=recompute).double()
        total = [0]

        def pack(t: Tensor, total: list[int] = total) -> Tensor:
            total[0] += t.numel() * t.element_size()
            return t

        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = block(leaf)
        saved[recompute] = total[0]
        grads[recompute] = torch.autograd.grad(out.square().sum(), leaf)[0]
    same = naive.gap(grads[True], grads[False])
    size = x.numel() * x.element_size()
    return saved[True] / size if same < 1e-12 else math.inf, saved[False] / size


@check(
    "sparse-transformer", "64 layers at the paper's initialisation: stream's std over the input's", below=1.5, control="without 1/sqrt(2N)"
)
def _() -> tuple[float, float]:
    def growth(layers: int) -> float:
        torch.manual_seed(0)
        x = y = torch.randn(1, 48, 32)
        with torch.no_grad():
            for _ in range(64):
                y = SparseBlock(32, 2, get("sparse-transformer", stride=8, count=2), layers=layers)(y)
        return float(y.std() / x.std())

    own = growth(64)
    return own if own >= 0.5 else math.inf, growth(1)


def moba_mask(q: Tensor, k: Tensor, size: int, top: int) -> Tensor:
    """Which pairs MoBA keeps, written as loops over heads and queries."""
    _, heads, n, _ = q.shape
    group = heads // k.shape[1]
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        for t in range(n):
            own = t // size
            gates = [(float(q[0, h, t] @ k[0, h // group, b * size : (b + 1) * size].mean(0)), b) for b in range(own)]
            chosen = [b for _, b in sorted(gates, reverse=True)[: top - 1]] + [own]
            for b in chosen:
                mask[h, t, b * size : (b + 1) * size] = True
            mask[h, t, t + 1 :] = False
    return mask


@check(
    "moba",
    "equals attention under the mask of a loop, L = 203 (ragged), c = 16, k = 3, grouped heads, with dq, dk, dv",
    below=1e-9,
    control="dense causal attention",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(203, heads=4, kv=2))
    out = attend(q, k, v, get("moba", block_size=16, top_k=3))
    mask = moba_mask(q.detach(), k.detach(), 16, 3)
    s = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, -math.inf)
    truth = s.softmax(-1) @ v.repeat_interleave(2, 1)
    seed = torch.randn_like(truth)
    pairs = zip(
        (out, *torch.autograd.grad((out * seed).sum(), (q, k, v))),
        (truth, *torch.autograd.grad((truth * seed).sum(), (q, k, v))),
        strict=True,
    )
    return max(naive.gap(a, b) for a, b in pairs), naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


@check("moba", "k >= number of blocks is dense causal attention", below=1e-10, control="k = 2")
def _() -> tuple[float, float]:
    q, k, v = qkv(203)
    truth = attend(q, k, v, "softmax", mask=Causal())
    return naive.gap(attend(q, k, v, get("moba", block_size=16, top_k=13)), truth), naive.gap(
        attend(q, k, v, get("moba", block_size=16, top_k=2)), truth
    )


@check(
    "moba",
    "changing tokens after t leaves outputs up to t as they were, t inside a block",
    below=1e-12,
    control="a gate that averages the whole block",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(203)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 101:] = torch.randn_like(x[:, :, 101:])
    mechanism = get("moba", block_size=16, top_k=3)
    own = naive.gap(attend(*later, mechanism)[:, :, :101], attend(q, k, v, mechanism)[:, :, :101])

    def leaky(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        means = torch.nn.functional.pad(k, (0, 0, 0, 5)).unflatten(2, (13, 16)).mean(3)
        gate = (q @ means.transpose(-1, -2)).masked_fill(torch.arange(13) > torch.arange(203)[:, None] // 16, -math.inf)
        keep = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, gate.topk(3, -1).indices, True).repeat_interleave(16, -1)[..., :203]
        return attend(q, k, v, "softmax", mask=keep & torch.ones(203, 203, dtype=torch.bool).tril())

    return own, naive.gap(leaky(*later)[:, :, :101], leaky(q, k, v)[:, :, :101])


@check("moba", "decoding token by token equals the parallel rows", below=1e-10, control="the last block always complete")
def _() -> tuple[float, float]:
    q, k, v = qkv(67)
    mechanism = get("moba", block_size=8, top_k=3)
    whole, state, outs = attend(q, k, v, mechanism), None, []
    for t in range(67):
        out, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], mechanism, state)
        outs.append(out)
    last = attend(q[:, :, -1:], k[:, :, :64], v[:, :, :64], mechanism)
    return naive.gap(torch.cat(outs, 2), whole), naive.gap(last, whole[:, :, -1:])


@check(
    "moba", "every query keeps exactly min(k, available) blocks, its own among them: queries that do not", below=0, control="k - 1 blocks"
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(203)

    def off(top: int) -> float:
        selector = get("moba", block_size=16, top_k=top).select  # type: ignore[attr-defined]
        keep = selection_of(selector, q, k).keep
        own = torch.arange(203) // 16
        count = keep.sum(-1)
        return float((count != (own + 1).clamp(max=3)).sum() + (~keep.gather(-1, own.expand(1, 2, -1)[..., None])).sum())

    return off(3), off(2)


def routed_loop(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, count: int, causal: bool, shared: bool) -> Tensor:
    """Routing attention as loops over heads and clusters."""
    q, k = formed(q, "layer+unit"), formed(q if shared else k, "layer+unit")
    mu = torch.nn.functional.normalize(centroids, dim=-1)
    n, scale = q.shape[2], q.shape[3] ** -0.5
    out, times = torch.zeros_like(v), torch.zeros(*v.shape[:3], 1, dtype=v.dtype)
    for h in range(q.shape[1]):
        for c in range(mu.shape[1]):
            near_q = sorted((q[0, h] @ mu[h, c]).topk(min(count, n)).indices.tolist())
            near_k = near_q if shared else sorted((k[0, h] @ mu[h, c]).topk(min(count, n)).indices.tolist())
            for i in near_q:
                seen = [j for j in near_k if not causal or j <= i]
                others = [j for j in seen if j != i]
                seen = others if shared and others else seen
                if seen:
                    p = naive.softmax(scale * (k[0, h, seen] @ q[0, h, i]))
                    out[0, h, i] += p @ v[0, h, seen]
                times[0, h, i] += 1
    return out / times.clamp_min(1)


@check("routing-transformer", "one cluster of all tokens is dense attention on unit-length q and k", below=1e-10, control="four clusters")
def _() -> tuple[float, float]:
    q, k, v = qkv(40)
    mu = torch.randn(2, 4, 8, dtype=F64)
    truth = attend(formed(q, "layer+unit"), formed(k, "layer+unit"), v, "softmax")
    one = attend(q, k, v, get("routing-transformer", clusters=1), centroids=mu[:, :1])
    return naive.gap(one, truth), naive.gap(attend(q, k, v, get("routing-transformer", clusters=4), centroids=mu), truth)


@check(
    "routing-transformer",
    "gather and scatter equal a loop over clusters: duplicates averaged, uncovered tokens zero, causal and shared too",
    below=1e-10,
    control="outputs summed, not averaged",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(40)
    mu = torch.randn(2, 5, 8, dtype=F64)
    own = 0.0
    for causal, shared in ((False, False), (True, False), (True, True)):
        mechanism = get("routing-transformer", clusters=5, members=11, shared=shared)
        out = attend(q, k, v, mechanism, mask=Causal() if causal else None, centroids=mu)
        own = max(own, naive.gap(out, routed_loop(q, k, v, mu, 11, causal, shared)))
    nearness = formed(q, "layer+unit") @ torch.nn.functional.normalize(mu, dim=-1).transpose(-1, -2)
    times = torch.zeros(1, 2, 40, 1, dtype=F64).scatter_add(
        2, nearness.transpose(-1, -2).topk(11, -1).indices.flatten(2)[..., None], torch.ones(1, 2, 55, 1, dtype=F64)
    )
    plain = attend(q, k, v, get("routing-transformer", clusters=5, members=11), centroids=mu)
    return own, naive.gap(plain * times.clamp_min(1), routed_loop(q, k, v, mu, 11, False, False))


@check(
    "routing-transformer", "one training step moves centroids by the averaging rule; none by gradient", below=1e-12, control="queries alone"
)
def _() -> tuple[float, float]:
    layer = RoutingAttention(16, 2, 3, routed=2, causal=False, decay=0.9).double()
    x = torch.randn(1, 20, 16, dtype=F64)
    before = layer.centroids.clone()
    q, k, _ = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    layer(x)[0].sum().backward()

    def by_hand(pools: tuple[Tensor, ...]) -> Tensor:
        new = before.clone()
        for h in range(2):
            for c in range(3):
                total = torch.zeros(8, dtype=F64)
                count = 0
                for pool in pools:
                    for t in formed(pool.detach(), "layer+unit")[0, h]:
                        if int((before[h] @ t).argmax()) == c:
                            total, count = total + t, count + 1
                if count:
                    moved = 0.9 * before[h, c] + 0.05 * total
                    new[h, c] = moved / moved.norm()
        return new

    free = float(layer.centroids.requires_grad)
    return naive.gap(layer.centroids, by_hand((q, k))) + free, naive.gap(layer.centroids, by_hand((q,)))


@check("routing-transformer", "an empty cluster keeps its centroid", below=0.0, control="a cluster with tokens")
def _() -> tuple[float, float]:
    q = qkv(30)[0]
    mu = torch.nn.functional.normalize(torch.randn(2, 3, 8, dtype=F64), dim=-1)
    base = formed(q, "layer+unit").mean((0, 2))
    mu[:, 2] = -torch.nn.functional.normalize(base, dim=-1)
    tight = torch.nn.functional.normalize(base, dim=-1)[None, :, None].expand(1, 2, 30, 8) * 5 + 0.01 * torch.randn(1, 2, 30, 8, dtype=F64)
    mu[:, 0] = formed(tight, "layer+unit")[0, :, 0]
    new = update_centroids(mu, tight, tight, 0.9)
    return naive.gap(new[:, 2], mu[:, 2]), naive.gap(new[:, 0], mu[:, 0]) or math.inf
