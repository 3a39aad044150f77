"""Checks of routing-transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, split_heads, standard
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import masked_softmax, qkv
from regard.lab.verification import check
from regard.zoo.sparse.routing_transformer import RoutingAttention, update_centroids


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def routed_loop(
    q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, count: int, causal: bool, shared: bool, form: str = "paper",
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Routing attention as loops over heads and clusters; LayerNorm and unit length ("paper"), or as one of two releases."""
    k = q if shared else k
    q, k = {"paper": lambda x: unit(standard(x)), "google": lambda x: standard(x, 1e-6), "port": lambda x: x}[form](torch.stack((q, k)))
    routes = [unit(x) if form == "port" else x for x in (q, k)]
    k = unit(k) if form == "port" and shared else k
    mu = unit(centroids)
    n, scale, extra = q.shape[2], 1.0 if form == "google" else q.shape[3] ** -0.5, {"paper": 0.0, "google": 1e-2, "port": 1e-5}[form]
    out, times = torch.zeros_like(v), torch.zeros(*v.shape[:3], 1, dtype=v.dtype)
    for h in range(q.shape[1]):
        for c in range(mu.shape[1]):
            near_q = sorted((routes[0][0, h] @ mu[h, c]).topk(min(count, n)).indices.tolist())
            near_k = near_q if shared else sorted((routes[1][0, h] @ mu[h, c]).topk(min(count, n)).indices.tolist())
            for i in near_q:
                seen = [j for j in near_k if not causal or j <= i]
                others = [j for j in seen if j != i]
                seen = others if shared and form != "google" and (others or memory) else seen
                keys, values = k[0, h, seen], v[0, h, seen]
                if memory is not None:
                    keys, values = torch.cat((memory[0][h, c], keys)), torch.cat((memory[1][h, c], values))
                if len(keys):
                    out[0, h, i] += naive.softmax(scale * (keys @ q[0, h, i])) @ values
                times[0, h, i] += 1
    return out / (times.clamp_min(1) if form == "paper" else times + extra)


@check("routing-transformer", "one cluster of all tokens is dense attention on unit-length q and k", below=1e-10, control="four clusters")
def _() -> tuple[float, float]:
    q, k, v = qkv(40)
    mu = torch.randn(2, 4, 8, dtype=F64)
    truth = attend(unit(standard(q)), unit(standard(k)), v, "softmax")
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
    nearness = unit(standard(q)) @ unit(mu).transpose(-1, -2)
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
                    for t in unit(standard(pool.detach()))[0, h]:
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
    base = unit(standard(q)).mean((0, 2))
    mu[:, 2] = -torch.nn.functional.normalize(base, dim=-1)
    tight = torch.nn.functional.normalize(base, dim=-1)[None, :, None].expand(1, 2, 30, 8) * 5 + 0.01 * torch.randn(1, 2, 30, 8, dtype=F64)
    mu[:, 0] = unit(standard(tight))[0, :, 0]
    new = update_centroids(mu, tight, tight, 0.9)
    return naive.gap(new[:, 2], mu[:, 2]), naive.gap(new[:, 0], mu[:, 0])


@check(
    "routing-transformer",
    "the forms of both releases and learned memory keys equal the loop: norms, scale, self-masking, what sums are divided by",
    below=1e-10,
    control="the paper's form",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(30)
    mu, memory = torch.randn(2, 4, 8, dtype=F64), torch.randn(2, 2, 4, 3, 8, dtype=F64)
    own, other = 0.0, math.inf
    for form in ("google", "port"):
        for causal, shared in ((False, False), (True, True)):
            mask = Causal() if causal else None
            truth = routed_loop(q, k, v, mu, 9, causal, shared, form)
            found = attend(q, k, v, get("routing-transformer", clusters=4, members=9, shared=shared, form=form), mask=mask, centroids=mu)
            plain = attend(q, k, v, get("routing-transformer", clusters=4, members=9, shared=shared), mask=mask, centroids=mu)
            own, other = max(own, naive.gap(found, truth)), min(other, naive.gap(plain, truth))
    kept = {"memory_k": memory[0], "memory_v": memory[1]}
    found = attend(q, k, v, get("routing-transformer", clusters=4, members=9, shared=True), mask=Causal(), centroids=mu, **kept)
    return max(own, naive.gap(found, routed_loop(q, k, v, mu, 9, True, True, memory=(memory[0], memory[1])))), other


@check(
    "routing-transformer",
    "the layer and its loss by hand: routed heads, local heads with their window, 1e-4 of the mean squared distance to the nearest centroid",
    below=1e-10,
    control="every head local",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, own = torch.randn(1, 26, 24, dtype=F64), 0.0
    for causal in (True, False):
        layer = RoutingAttention(24, 3, 4, members=8, routed=1, window=5, causal=causal).double().eval()
        q, k, v = (split_heads(y, 3) for y in (x @ layer.qkv.weight.T).chunk(3, -1))
        i, j = torch.arange(26)[:, None], torch.arange(26)
        near = ((i - j).abs() < 5) & ((j <= i) | (not causal))
        far = routed_loop(q[:, :1], k[:, :1], v[:, :1], layer.centroids, 8, causal, causal)
        local = masked_softmax(q, k, v, near)
        y, loss = layer(x)
        own = max(own, naive.gap(y, join_heads(torch.cat((far, local[:, 1:]), 1)) @ layer.out.weight.T))
        tokens = unit(standard(q[0, 0]))
        nearest = [min(float((t - c).square().sum()) for c in layer.centroids[0]) for t in tokens]
        own = max(own, abs(float(loss) - 1e-4 * sum(nearest) / (26 * 8)) * 1e4)
        same = layer.centroids.clone()
        layer(x)
        own += float((layer.centroids != same).sum())  # evaluation moves nothing
    return own, naive.gap(y, join_heads(local) @ layer.out.weight.T)


@check(
    "routing-transformer",
    "causal: with every token in every cluster, later tokens change no output before them",
    below=1e-12,
    control="clusters of 8, whose members are chosen over the whole sequence",
)
def _() -> tuple[float, float]:
    q, _, v = qkv(32)
    mu, gaps = torch.randn(2, 4, 8, dtype=F64), []
    later = [torch.cat((x[:, :, :20], torch.randn_like(x[:, :, 20:])), 2) for x in (q, v)]
    for members in (32, 8):
        mechanism = get("routing-transformer", clusters=4, members=members, shared=True)
        outs = [attend(a, a, b, mechanism, mask=Causal(), centroids=mu)[:, :, :20] for a, b in ((q, v), later)]
        gaps.append(naive.gap(outs[0], outs[1]))
    return gaps[0], gaps[1]
