"""Checks of sea."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.linear.sea import Estimate, SEAAttention, expand, kept_tokens, listed, sparse_softmax


@check(
    "sea",
    "K = T = k, the teacher's own map, open gates: dense softmax attention, both directions and causal",
    below=1e-6,
    control="half as many keys",
)
def _() -> tuple[float, float]:
    def miss(keys: int) -> float:
        worst = 0.0
        for causal in (False, True):
            q, k, v = (x.double() for x in qkv(32))
            layer = SEAAttention(2, 8, cells=32, keys=keys, causal=causal).double()
            s = q @ k.mT * 8**-0.5
            p = (s.masked_fill(torch.ones(32, 32).triu(1).bool(), -math.inf) if causal else s).softmax(-1)
            gate = torch.full((1, 2, 32, 1), 1e3, dtype=F64)
            out = layer.combined(q, k, v, Estimate(p, s, (gate, gate)))
            worst = max(worst, naive.gap(out, attend(q, k, v, mask=Causal() if causal else None)))
        return worst

    return miss(32), miss(16)


def covered(random_mask: bool, smooth: bool) -> float:
    """Attention mass of the expanded mask of an oracle map at K = T / 2 over that of the exact top keys; T = 128, k = 16."""
    s = torch.randn(1, 4, 128, 128, dtype=F64) * 2
    if smooth:
        s = 3 * F.avg_pool1d(s[0], 5, 1, 2)[None]
    p = s.softmax(-1)
    seen = kept_tokens(p.unflatten(-1, (64, 2)).sum(-1), 16, False, grouped=False)
    if random_mask:
        seen = torch.rand_like(p).argsort(-1).argsort(-1) < 16
    counts = seen.sum(-1)
    if not (int(counts.min()) >= 1 and int(counts.max()) <= 24):
        return math.nan
    return float((p * seen).sum(-1).mean() / p.topk(16, -1).values.sum(-1).mean())


@check(
    "sea",
    "oracle map of half the width, 16 of 128 keys: mass over the exact top keys' (random scores)",
    above=0.75,
    control="16 keys at random",
)
def _() -> tuple[float, float]:
    return min(covered(False, False), covered(False, True)), covered(True, False)


@check(
    "sea",
    "listed keys == those of the expanded mask, none behind the query; sparse softmax over lists == masked dense",
    below=1e-12,
    control="one key fewer a row",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for causal in (False, True):
        q, k, v = qkv(50)
        p = torch.rand(1, 2, 50, 20, dtype=F64)
        seen, rows = kept_tokens(p, 8, causal), listed(p, 8, causal)
        counted = torch.zeros(1, 2, 50, 50).scatter_add(-1, rows.at, rows.real.float())
        same = float((counted != seen.float()).sum()) + (float(seen.triu(1).sum()) if causal else 0.0)

        def dense(seen: Tensor, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return (q @ k.mT * 8**-0.5).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0) @ v

        found = sparse_softmax(q, k, v, rows)
        own.append(max(same, naive.gap(found, dense(seen))))
        fewer = seen & ~F.one_hot(seen.int().argmax(-1), 50).bool()
        other = min(other, naive.gap(found, dense(fewer)))
    return max(own), other


@check("sea", "kept pairs at T = 2048 over those at T = 512, less 4", below=0.4, control="every key kept")
def _() -> tuple[float, float]:
    def grown(keys: int | None) -> float:
        counts = [float(listed(torch.rand(1, 2, n, 256), keys or n, False).real.sum()) for n in (512, 2048)]
        return abs(counts[1] / counts[0] - 4)

    return grown(64), grown(None)


def teacher(count: int, length: int = 128, seed: int = 0) -> list[Tensor]:
    """q, k, v of the second layer of a random model that knows places."""
    fixed = torch.Generator().manual_seed(7)
    w = [torch.randn(16, 2, 8, generator=fixed) * 0.6 for _ in range(3)]
    mix = torch.randn(16, 16, generator=fixed) / 4
    x = torch.randn(count, length, 16, generator=torch.Generator().manual_seed(seed))
    x = torch.tanh(x + (x @ mix @ x.mT / 4).softmax(-1) @ x)
    angle = torch.arange(length)[:, None] * torch.exp(-0.6 * torch.arange(8))
    x = 0.5 * x + torch.cat((angle.sin(), angle.cos()), -1)
    return [torch.einsum("btc,chd->bhtd", x, y) for y in w]


@functools.cache
def distilled(causal: bool) -> tuple[float, float, float]:
    """(KL before, after 200 steps, after as many steps towards targets of other inputs)."""
    found = []
    for shuffled in (False, True):
        torch.manual_seed(0)
        layer = SEAAttention(2, 8, cells=64, keys=8, causal=causal)
        optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
        test = teacher(4, seed=10_000)
        with torch.no_grad():
            before = float(layer.losses(*test)["kl"])
        for step in range(200):
            q, k, v = teacher(4, seed=step)
            if shuffled:
                q, k = q.flip(2), k[:, :, torch.randperm(128)]
            loss = layer.losses(q, k, v, kl_weight=1.0)["total"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            found.append(float(layer.losses(*test)["kl"]))
    return before, found[0], found[1]


@check(
    "sea",
    "200 steps of distillation on a random teacher, T = 128: KL after over before, both forms",
    below=0.7,
    control="distilled from q and k of shuffled places",
)
def _() -> tuple[float, float]:
    rows = [distilled(causal) for causal in (False, True)]
    return max(after / before for before, after, _ in rows), min(other / before for before, _, other in rows)


@check(
    "sea",
    "causal: what the estimate up to t changes when later tokens do; expanded rows sum to 1",
    below=1e-6,
    control="the form of both directions",
)
def _() -> tuple[float, float]:
    def leak(causal: bool) -> float:
        layer = SEAAttention(2, 8, cells=16, keys=8, causal=causal).double()
        x = qkv(40)
        v = torch.randn(1, 2, 40, 8, dtype=F64)
        other = [torch.cat((y[:, :, :25], torch.randn_like(y[:, :, 25:])), 2) for y in (x[0], x[1], v)]
        p = layer.estimate(x[0], x[1], v).probabilities
        sums = naive.gap(expand(p, causal).sum(-1), torch.ones(1, 2, 40))
        change = naive.gap(layer(x[0], x[1], v)[:, :, :25], layer(*other)[:, :, :25])
        return max(change, sums)

    return leak(True), leak(False)
