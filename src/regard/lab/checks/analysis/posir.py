"""Checks of posir."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard import models
from regard.algebra import Weighted, Window
from regard.interpret.embedding import resampled, token_saliency
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.decoder import Decoder
from regard.nn.embedder import Embedder, LatentPool, last_pool
from regard.tasks.evidence import evidence, ndcg
from regard.zoo.analysis.posir import curve, embedding_saliency, position_report, report_of


def by_hand(place: list[float], score: list[float], bins: int) -> tuple[list[float], list[float], list[int]]:
    """Centres, means and counts of the bins that hold something, query by query."""
    held: dict[int, list[float]] = {}
    for p, s in zip(place, score, strict=True):
        at = next(n for n in range(bins) if p <= (n + 1) * (1 / bins) or n == bins - 1)
        held.setdefault(at, []).append(s)
    order = sorted(held)
    return [(n + 0.5) / bins for n in order], [sum(held[n]) / len(held[n]) for n in order], [len(held[n]) for n in order]


@check(
    "posir",
    "curves, PSI, scores and buckets of uneven and missing bins, places and lengths on their bounds, equal loops; PSI of known profiles",
    below=1e-12,
    control="places in tokens over the longest document's, not the own",
)
def _() -> tuple[float, float]:
    draw = torch.Generator().manual_seed(2)
    place = torch.rand(300, generator=draw, dtype=F64) * 0.7
    place[:8] = torch.tensor([0.0, 0.05, 0.1, 0.15, 0.35, 1.0, 0.5, 0.05000001], dtype=F64)
    score = torch.rand(300, generator=draw, dtype=F64)
    length = torch.randint(1, 2000, (300,), generator=draw)
    length[:7] = torch.tensor([512, 513, 1024, 1025, 1536, 1537, 1])
    found = report_of(score, place, length)
    gap = abs(found.score - float(score.mean()))
    bounds = {"Q1": (0, 512), "Q2": (512, 1024), "Q3": (1024, 1536), "Q4": (1536, math.inf), "all": (0, math.inf)}
    for name, (low, high) in bounds.items():
        own = found.overall if name == "all" else found.buckets[name]
        inside = [n for n in range(300) if low < int(length[n]) <= high]
        centre, mean, count = by_hand(place[inside].tolist(), score[inside].tolist(), 20)
        gap = max(
            gap,
            *(naive.gap(a.double(), torch.tensor(b, dtype=F64)) for a, b in ((own.centre, centre), (own.mean, mean), (own.count, count))),
        )
        gap = max(gap, abs(own.psi - (1 - min(mean) / max(mean))), abs(own.score - sum(mean) / len(mean)))
    even = torch.arange(20, dtype=F64) / 20 + 0.01
    slope = torch.linspace(1, 0.25, 20, dtype=F64)
    gap = max(gap, curve(even, torch.ones(20)).psi, abs(curve(even, slope).psi - 0.75), abs(curve(even, 7 * slope).psi - 0.75))
    raw = report_of(score, place * length / length.max(), length)
    return gap, abs(raw.psi - found.psi)


@check(
    "posir",
    "trends of a noisy curve: least squares, ranks and pairs by hand, and their signs for primacy and recency",
    below=1e-10,
    control="the curve turned round",
)
def _() -> tuple[float, float]:
    x = (torch.arange(20, dtype=F64) + 0.5) / 20
    y = torch.tensor([9.0, 8, 8.5, 7, 7, 6, 6.5, 5, 5.5, 5, 4, 4.5, 4, 3, 3.5, 2, 3, 2, 1, 1.5], dtype=F64)

    def hand(y: Tensor) -> dict[str, float]:
        dx, dy = x - x.mean(), y - y.mean()
        slope = float((dx * dy).sum() / dx.square().sum())
        pearson = float((dx * dy).sum() / (dx.square().sum() * dy.square().sum()).sqrt())
        rank = torch.tensor([sum(1.0 for b in y if b < a) + (sum(1.0 for b in y if b == a) - 1) / 2 for a in y], dtype=F64)
        dr = rank - rank.mean()
        spearman = float((dx * dr).sum() / (dx.square().sum() * dr.square().sum()).sqrt())
        pairs = [(a, b) for a in range(20) for b in range(a)]
        signs = sum(float(torch.sign(y[a] - y[b])) for a, b in pairs)
        ties = sum(float(y[a] == y[b]) for a, b in pairs)
        kendall = signs / math.sqrt(190 * (190 - ties))
        line = {"slope": slope, "intercept": float(y.mean()) - slope * float(x.mean()), "r_squared": pearson**2}
        return {**line, "pearson": pearson, "spearman": spearman, "kendall": kendall}

    early, late = curve(x, y).trend(), curve(x, y.flip(0)).trend()
    truth = hand(y)
    signs = all(early[name] < 0 < late[name] for name in ("slope", "pearson", "spearman", "kendall"))
    flat = any(curve(x, torch.ones(20, dtype=F64)).trend()[name] for name in ("slope", "spearman", "kendall"))
    wrong = max(abs(early[name] - truth[name]) for name in truth)
    return wrong if signs and not flat else 1.0, max(abs(late[name] - truth[name]) for name in truth)


@check(
    "posir",
    "nDCG@k with graded relevance, k = 10 and 3, and with more places than documents: loops",
    below=1e-12,
    control="2^rel - 1 as gains",
)
def _() -> tuple[float, float]:
    score, relevance = torch.randn(6, 15, dtype=F64), torch.randint(0, 4, (6, 15))
    relevance[0] = torch.nn.functional.one_hot(torch.tensor(3), 15)
    relevance[:, 3] += 1

    def hand(k: int, power: bool) -> Tensor:
        out = []
        for s, r in zip(score.tolist(), relevance.tolist(), strict=True):
            gain = [2**x - 1 if power else x for x in r]
            order = sorted(range(15), key=lambda n: -s[n])
            dcg = sum(gain[n] / math.log2(at + 2) for at, n in enumerate(order[:k]))
            out.append(dcg / sum(g / math.log2(at + 2) for at, g in enumerate(sorted(gain, reverse=True)[:k])))
        return torch.tensor(out, dtype=F64)

    gap = max(naive.gap(ndcg(score, relevance, k), hand(k, False)) for k in (10, 3, 40))
    return gap, naive.gap(ndcg(score, relevance), hand(10, True))


class Linear(nn.Module):
    """States e W of embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.turn = nn.Embedding(40, 6, dtype=F64), nn.Linear(6, 5, False, dtype=F64)

    def states(self, embedded: Tensor, keep: Tensor) -> Tensor:
        return self.turn(embedded)  # type: ignore[no-any-return]


@check(
    "posir",
    "saliency of a linear model with mean pooling: the closed form, the same at all places; clipped and read at 100 places as by loops",
    below=1e-10,
    control="the last token's vector",
)
def _() -> tuple[float, float]:
    model, query, document = Linear(), torch.randint(40, (7,)), torch.randint(40, (23,))
    w = model.turn.weight
    q, d = (model.embed(ids).mean(0) @ w.T for ids in (query, document))
    q, unit = q / q.norm(), d / d.norm()
    truth = (((q - (q @ unit) * unit) / d.norm()) @ w / 23).norm().detach()
    gap = naive.gap(token_saliency(Embedder(model), query, document), truth.expand(22))
    gap = max(gap, float(len(token_saliency(Embedder(model), query, document, drop=(1, 2))) != 20))

    x = torch.rand(57, dtype=F64)
    order = sorted(x.tolist())
    place = 0.99 * 56
    top = order[int(place)] + (place - int(place)) * (order[int(place) + 1] - order[int(place)])
    scaled, read = [min(v, top) / top for v in x.tolist()], []
    for n in range(100):
        at = n * 56 / 99
        low = min(int(at), 55)
        read.append(scaled[low] + (at - low) * (scaled[low + 1] - scaled[low]))
    gap = max(gap, naive.gap(resampled(x), torch.tensor(read, dtype=F64)), float(resampled(torch.zeros(9), 4).abs().sum()))
    data = evidence([30, 40, 40, 20], torch.Generator().manual_seed(0), places=[0.5, 0.5, 0.9, 0.5], fillers=10, words=20)
    pairs = [(data.queries[n], data.documents[n, : data.lengths[n]]) for n in (0, 1)]
    own = torch.stack([resampled(token_saliency(Embedder(model), *pair), 11) for pair in pairs]).mean(0)
    gap = max(gap, naive.gap(embedding_saliency(Embedder(model), data, least=25, points=11), own))
    return gap, naive.gap(token_saliency(Embedder(model, "last"), query, document), truth.expand(22))


@check(
    "posir",
    "last token of two layers with a causal window of 4: saliency outside the 7 tokens in reach (exactly 0, and no 0 inside)",
    below=0.0,
    control="without the window",
)
def _() -> tuple[float, float]:
    query, document = torch.randint(40, (7,)), torch.randint(40, (23,))

    def outside(mask: bool) -> float:
        torch.manual_seed(1)
        layers = [Attention(16, 2, Weighted(mask=Window(4)) if mask else "softmax", rope=True) for _ in range(2)]
        model = Embedder(Decoder(layers, vocab=40, dim=16, layers=2), "last")
        found = token_saliency(model, query, document, drop=(0, 0))
        return float(found[:-7].max()) if float(found[-7:].min()) > 0 else 1.0

    return outside(True), outside(False)


def retriever(seed: int) -> tuple[Embedder, Tensor]:
    """Word vectors drawn for two languages alike, fillers near 0, and the map of ids from the first to the second."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.cat((torch.zeros(1, 64), 0.01 * torch.randn(50, 64, generator=generator), torch.randn(500, 64, generator=generator)))
    model = Linear()
    model.embed = nn.Embedding.from_pretrained(torch.cat((table, table)))
    model.turn = nn.Identity()  # type: ignore[assignment]
    return Embedder(model), torch.arange(551) + 551


@check(
    "posir",
    "PSI of a mean-pooled encoder, in one language and across two; slopes of encoders that read the first or the last half",
    below=0.1,
    control="reading the first half alone",
)
def _() -> tuple[float, float]:
    model, other = retriever(0)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(60, 400, (200,), generator=generator).tolist()
    places = [n / 199 for n in range(200)]

    def half(first: bool) -> tuple[float, float]:
        def encode(ids: Tensor, keep: Tensor) -> Tensor:
            if ids.shape[1] <= 8:
                return model(ids, keep)  # type: ignore[no-any-return]
            at, middle = torch.arange(ids.shape[1]), keep.sum(1, keepdim=True) // 2
            return model(ids, keep & ((at < middle) == first))  # type: ignore[no-any-return]

        found = position_report(encode, evidence(lengths, generator, places=places))
        return found.psi, found.overall.trend()["slope"]

    own = [position_report(model, evidence(lengths, generator, places=places, translation=t)) for t in (None, other)]
    (first, falls), (last, rises) = half(True), half(False)
    good = all(x.score > 0.95 for x in own) and min(first, last) >= 0.8 and falls < -0.5 < 0.5 < rises
    return max(x.psi for x in own) if good else 1.0, first


@check(
    "posir",
    "latent pooling == by hand with gradients; vectors of padded batches == alone: a decoder of regard and one of transformers, last and mean",
    below=1e-5,
    control="padding not told",
)
def _() -> tuple[float, float]:
    pool, x, keep = (
        drawn(LatentPool(12, latents=5, heads=2, head_dim=3, ratio=2)),
        torch.randn(2, 7, 12, dtype=F64),
        torch.ones(2, 7).bool(),
    )
    keep[1, 4:] = False

    def normed(y: Tensor, norm: nn.LayerNorm) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    kv, q = normed(pool.latents, pool.latent_norm) @ pool.kv.weight.T, normed(x, pool.norm) @ pool.q.weight.T
    read = [(q[..., 3 * h : 3 * h + 3] @ kv[:, 3 * h : 3 * h + 3].T / 3**0.5).softmax(-1) @ kv[:, 6 + 3 * h : 9 + 3 * h] for h in range(2)]
    y = x + torch.cat(read, -1) @ pool.out.weight.T
    wide = normed(y, pool.mlp_norm) @ pool.up.weight.T + pool.up.bias
    gate = wide[..., 24:]
    y = y + (wide[..., :24] * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))) @ pool.down.weight.T + pool.down.bias
    truth = torch.stack([y[0].mean(0), y[1, :4].mean(0)])
    gap = gap_with_gradients(pool(x, keep), truth, tuple(pool.parameters()))

    torch.manual_seed(0)
    worst, told = gap, math.inf
    for host in (Decoder(vocab=300, dim=16, layers=2, heads=2).eval(), models.load("tiny")):
        for kind in ("mean", "last"):
            model, ids = Embedder(host, kind), torch.randint(1, 256, (1, 9))
            alone = model(ids)
            for left in (0, 3):
                padded = torch.cat((torch.full((1, left), 7), ids, torch.full((1, 3 - left), 7)), 1)
                real = torch.zeros(1, 12).bool()
                real[:, left : left + 9] = True
                both = model(padded.expand(2, -1), torch.cat((real, torch.ones(1, 12).bool())))[:1]
                worst = max(worst, naive.gap(both, alone) / float(alone.detach().abs().max()))
                told = min(told, naive.gap(model(padded), alone))
    inside = last_pool(x, torch.tensor([[1, 0, 1, 1, 0, 1, 0], [0] * 7]).bool())
    return max(worst, naive.gap(inside, torch.stack((x[0, 5], x[1, 0])))), told
