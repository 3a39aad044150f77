"""Checks of routing-transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.composed import formed
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
from regard.lab.verification import check
from regard.zoo.sparse.routing_transformer import RoutingAttention, update_centroids


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
