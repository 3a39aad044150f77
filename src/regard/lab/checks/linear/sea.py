"""Checks of sea."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Sizes
from regard.algebra.feature_map import orthogonal_gaussian
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn
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


def averages(v: Tensor, estimate: Tensor, causal: bool) -> Tensor:
    """Causal: the mean of v up to each token; else the cells' means of v, weighed by the map."""
    n, cells = v.shape[2], estimate.shape[-1]
    if causal:
        return torch.stack([v[:, :, : t + 1].mean(2) for t in range(n)], 2)
    out = torch.zeros_like(v)
    for c in range(cells):
        own = [j for j in range(n) if j * cells // n == c]
        out = out + estimate[..., c : c + 1] * (v[:, :, own].mean(2, keepdim=True) if own else 0.0)
    return out


@check(
    "sea",
    "gates at work: g0 of the sparse softmax, g1 between it and the average, both forms, heads sharing their budget or not",
    below=1e-10,
    control="closed gates left out",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for causal in (False, True):
        for grouped in (False, True):
            q, k, v = qkv(30)
            layer = SEAAttention(2, 8, cells=12, keys=6, causal=causal, grouped=grouped).double()
            p, gates = torch.rand(1, 2, 30, 12, dtype=F64), torch.randn(2, 1, 2, 30, 1, dtype=F64)
            p = p / p.sum(-1, keepdim=True)
            seen = torch.zeros(2, 30, 30, dtype=torch.bool)
            for t in range(30):
                length = t + 1 if causal else 30
                wanted = min(12, max(1, math.ceil(6 * 12 / length)))
                rank = [(float(p[0, h, t, c]), h, c) for h in range(2) for c in range(12)]
                if grouped:
                    kept = {(h, c) for _, h, c in sorted(rank)[-2 * wanted :]} | {max(rank[:12])[1:], max(rank[12:])[1:]}
                else:
                    kept = {(h, c) for half in (rank[:12], rank[12:]) for _, h, c in sorted(half)[-wanted:]}
                for h in range(2):
                    seen[h, t, [j for j in range(length) if (h, j * 12 // length) in kept]] = True
                    seen[h, t, t] |= not bool(seen[h, t].any())
            sparse = (q @ k.mT * 8**-0.5).masked_fill(~seen, -math.inf).softmax(-1) @ v
            g0, g1 = 1 / (1 + torch.exp(-gates))
            mean = averages(v, p, causal)
            out = layer.combined(q, k, v, Estimate(p, p.log(), (gates[0], gates[1])))
            own.append(naive.gap(out, g1 * g0 * sparse + (1 - g1) * mean))
            other = min(other, naive.gap(out, sparse))
    return max(own), other


def estimated(layer: SEAAttention, q: Tensor, k: Tensor, v: Tensor, content: bool = True) -> tuple[Tensor, Tensor]:
    """(the map, the gates) by hand: Performer's contexts of places and values, MLP, convolutions. content False: contexts are plain means."""
    n, d = q.shape[2:]
    projection = orthogonal_gaussian(Sizes(1, 2, 2, n, n, d, d), 32).to(F64)
    if layer.causal:
        assert layer.place is not None
        place = layer.place[:n]
    else:  # the identity, its d columns read at n places in a line between their centres
        at = ((torch.arange(n, dtype=F64) + 0.5) * d / n - 0.5).clamp(0, d - 1)
        place = (1 - (at[:, None] - torch.arange(d)).abs()).clamp_min(0)
    values = torch.cat((place.expand(1, 2, n, d), v), -1)
    if content:
        a, b = ((x / d**0.25) @ projection.T for x in (q, k))
        half_q, half_k = (x.square().sum(-1, keepdim=True) / (2 * d**0.5) for x in (q, k))
        top = 0.0 if layer.causal else b.amax((-1, -2), keepdim=True)
        fq, fk = torch.exp(a - half_q - a.amax(-1, keepdim=True)) + 1e-4, torch.exp(b - half_k - top) + 1e-4
        w = fq @ fk.mT
        more = 32**0.5 * 1e-6 * fq.sum(-1, keepdim=True) if layer.causal else 0.0
    else:
        w, more = torch.ones(1, 2, n, n, dtype=F64), 0.0
    w = w.tril() if layer.causal else w
    f = torch.cat((w @ values / (w.sum(-1, keepdim=True) + more), v), -1)
    first, norm, _ = layer.encoder
    e = F.layer_norm(f @ first.weight.T + first.bias, (2 * d,), norm.weight, norm.bias)  # type: ignore[arg-type, operator]
    e = e * (1 + torch.erf(e / math.sqrt(2))) / 2
    x = e @ layer.decoder.weight.T + layer.decoder.bias
    if layer.causal:
        x = F.layer_norm(x, x.shape[-1:], layer.norm_in.weight, layer.norm_in.bias)
        for conv, reach in zip(layer.convs, (1, 2), strict=True):
            shifted = F.pad(x, (1, 1, 2 * reach, 0))
            x = F.conv2d(shifted, conv.conv.weight, conv.conv.bias, dilation=(reach, 1)).clamp_min(0)  # type: ignore[arg-type, union-attr]
        x = F.conv2d(torch.stack([x] * 4, -1).flatten(-2), layer.last.weight, layer.last.bias)
        x = F.layer_norm(x, x.shape[-1:], layer.norm_out.weight, layer.norm_out.bias)
    else:
        x = F.conv2d(x, layer.convs[0].weight, layer.convs[0].bias, stride=(2, 1), padding=1).clamp_min(0)  # type: ignore[arg-type]
        x = F.conv2d(x, layer.convs[1].weight, layer.convs[1].bias, padding=1).clamp_min(0)  # type: ignore[arg-type]
        x = x[:, :, [t * x.shape[2] // n for t in range(n)]]
        x = F.conv2d(x, layer.last.weight, layer.last.bias, padding=1)
    return x.softmax(-1), e @ layer.gates.weight.T + layer.gates.bias


@check(
    "sea",
    "the estimate and its gates, both forms == Performer contexts of places and values, MLP and convolutions by hand",
    below=1e-8,
    control="contexts without q and k",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for causal in (False, True):
        layer = drawn(SEAAttention(2, 8, cells=12, keys=6, causal=causal, max_len=40))
        q, k, v = qkv(15)
        found, (p, gates) = layer.estimate(q, k, v), estimated(layer, q, k, v)
        own += [naive.gap(found.probabilities, p), naive.gap(torch.cat(found.gates, -1), gates)]
        other = min(other, naive.gap(found.probabilities, estimated(layer, q, k, v, content=False)[0]))
    return max(own), other


@check(
    "sea",
    "losses: KL of the teacher's rows from the expanded map, squares of probabilities and of outputs, 0.1 of the first in the total",
    below=1e-10,
    control="KL the other way round",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for causal in (False, True):
        layer = SEAAttention(2, 8, cells=12, keys=6, causal=causal).double()
        q, k, v = qkv(20)
        hidden = torch.ones(20, 20, dtype=torch.bool).triu(1) if causal else torch.zeros(20, 20, dtype=torch.bool)
        p = (q @ k.mT * 8**-0.5).masked_fill(hidden, -math.inf).softmax(-1)
        found, a = layer.estimate(q, k, v), torch.zeros(1, 2, 20, 20, dtype=F64)
        for t in range(20):
            length = t + 1 if causal else 20
            for j in range(length):
                a[:, :, t, j] = found.probabilities[:, :, t, j * 12 // length].detach()
        a = a / a.sum(-1, keepdim=True)
        loss, there = layer.losses(q, k, v), p > 0

        def divergence(x: Tensor, y: Tensor, there: Tensor = there) -> Tensor:
            return torch.where(there, x * (x / y).log(), 0.0).nan_to_num(0.0).sum(-1).mean()

        squares = (a - p).square().sum(-1).mean(), (layer(q, k, v) - p @ v).square().mean()
        own += [
            naive.gap(loss["kl"], divergence(p, a)),
            naive.gap(loss["probabilities"], squares[0]),
            naive.gap(loss["output"], squares[1]),
        ]
        own.append(naive.gap(loss["total"], 0.1 * divergence(p, a) + squares[0] + squares[1]))
        other = min(other, naive.gap(loss["kl"], divergence(a, p)))
    return max(own), other


def teacher(count: int, length: int = 32, seed: int = 0) -> list[Tensor]:
    """q, k, v of the second layer of a random model that knows places."""
    fixed = torch.Generator().manual_seed(7)
    w = [torch.randn(16, 2, 8, generator=fixed) * 0.6 for _ in range(3)]
    mix = torch.randn(16, 16, generator=fixed) / 4
    x = torch.randn(count, length, 16, generator=torch.Generator().manual_seed(seed))
    x = torch.tanh(x + (x @ mix @ x.mT / 4).softmax(-1) @ x)
    angle = torch.arange(length)[:, None] * torch.exp(-0.6 * torch.arange(8))
    x = 0.35 * x + torch.cat((angle.sin(), angle.cos()), -1)
    return [torch.einsum("btc,chd->bhtd", x, y) for y in w]


def distilled(causal: bool, shuffled: bool = False, steps: int = 150) -> float:
    """KL on other inputs after training over before; shuffled: the training's targets are of q and k whose places are shuffled."""
    torch.manual_seed(0)
    layer = SEAAttention(2, 8, cells=16, keys=8, causal=causal)
    optimiser = torch.optim.Adam(layer.parameters(), 2e-2)
    test = teacher(4, seed=10_000)
    with torch.no_grad():
        before = float(layer.losses(*test)["kl"])
    for step in range(steps):
        q, k, v = teacher(4, seed=step)
        if shuffled:
            q, k = q.flip(2), k[:, :, torch.randperm(32)]
        loss = layer.losses(q, k, v, kl_weight=1.0)["total"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return float(layer.losses(*test)["kl"]) / before


@check(
    "sea",
    "150 steps of distillation on a random teacher, T = 32: KL after over before, the worse of both forms",
    below=0.5,
    control="the causal form distilled from q and k of shuffled places",
)
def _() -> tuple[float, float]:
    return max(distilled(False), distilled(True)), distilled(True, shuffled=True)


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
