"""Checks of SEA's estimated maps, learned eviction, and the ranks of token mixers."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Sinks, Window
from ...engine import attend
from ...nn import BudgetController, Decoder, LTEAttention, SEAAttention, lalte_layers
from ...nn.estimated import Estimate, expand, kept_tokens, listed, sparse_softmax
from ...nn.eviction import MARGIN, Scored
from .. import naive
from ..experiments.mixing import SelectiveSSM, binary_auc, dino_run, mixing_ranks, selective_matrix, selective_scan, token_mixing_matrix
from ..verification import check
from .weighted import qkv

F64 = torch.float64


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


@check("sea", "kept pairs at T = 2048 over those at T = 512, less 4", below=0.4, control="dense attention")
def _() -> tuple[float, float]:
    counts = [float(listed(torch.rand(1, 2, n, 256), 64, False).real.sum()) for n in (512, 2048)]
    return abs(counts[1] / counts[0] - 4), abs(2048**2 / 512**2 - 4)


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


def evicting(bias: float, **options: int) -> LTEAttention:
    layer = LTEAttention(16, 2, window=8, sinks=2, **{"budget": 64, **options}).double().eval()
    layer.router.last.weight.data.mul_(8)  # decisions of both kinds
    layer.router.last.bias.data.fill_(bias)  # type: ignore[union-attr]
    return layer


@check("lalte", "all scores positive: causal softmax; all negative: sinks and window", below=1e-12, control="the two swapped")
def _() -> tuple[float, float]:
    x, gaps, swapped = torch.randn(2, 64, 16, dtype=F64), [], []
    for bias in (1e4, -1e4):
        layer = evicting(bias)
        q, k, v = layer.split(x)
        at = torch.arange(64)
        q, k = layer.rope.rotate(q, at), layer.rope.rotate(k, at)
        near = Causal() & (Window(9) | Sinks(2))
        outs = [layer.out(attend(q, k, v, mask=m).transpose(1, 2).flatten(-2)) for m in (Causal(), near)]
        y = layer(x)
        gaps.append(naive.gap(y, outs[0 if bias > 0 else 1]))
        swapped.append(naive.gap(y, outs[1 if bias > 0 else 0]))
    return max(gaps), min(swapped)


@check(
    "lalte",
    "decoding with a ring of tokens and places for the kept == the masked pass; the kept are some, not all",
    below=1e-10,
    control="places for three",
)
def _() -> tuple[float, float]:
    x, found = torch.randn(2, 64, 16, dtype=F64), []
    for budget in (64, 5):
        torch.manual_seed(3)
        layer = evicting(0.0, budget=budget)
        y = layer(x)
        share = float(layer.kept.double().mean())
        found.append(naive.gap(layer.step(x)[0], y) if 0.1 < share < 0.9 else math.nan)
    return found[0], found[1]


@check(
    "lalte",
    "places for six: those held are the six of largest score that left the window: how many are not",
    below=0,
    control="the last six to leave (FIFO)",
)
def _() -> tuple[float, float]:
    torch.manual_seed(3)
    x, layer = torch.randn(1, 64, 16, dtype=F64), evicting(0.5, budget=8)
    layer(x)
    gone = layer.scores[..., 2 : 64 - 9]
    best = gone.topk(6, -1).indices + 2
    held = layer.step(x)[1].place
    wrong = sum(len(set(a.tolist()) - set(b.tolist())) for a, b in zip(held.flatten(0, 1), best.flatten(0, 1), strict=True))
    fifo = torch.arange(49, 55).expand_as(best)
    return wrong, sum(len(set(a.tolist()) - set(b.tolist())) for a, b in zip(fifo.flatten(0, 1), best.flatten(0, 1), strict=True))


@check("lalte", "the router's gradient == the change of the loss when v_j grows by its share", below=1e-6, control="without the factor v")
def _() -> tuple[float, float]:
    q, k, v = qkv(20)
    seed = torch.randn_like(v)

    def loss(v: Tensor) -> Tensor:
        return (attend(q, k, v, mask=Causal()) * seed).sum().tanh()

    v.requires_grad_()
    score = torch.zeros(1, 2, 20, dtype=F64, requires_grad=True)
    dv, own = torch.autograd.grad(loss(Scored.apply(v, score)), (v, score))
    numeric = torch.zeros_like(own)
    with torch.no_grad():
        for h in range(2):
            for j in range(20):
                step = torch.zeros(1, 2, 20, 1, dtype=F64)
                step[0, h, j] = 1e-5
                numeric[0, h, j] = (loss(v * (1 + step)) - loss(v * (1 - step))) / 2e-5
    return naive.gap(own, numeric), naive.gap(dv.sum(-1), numeric)


@check(
    "lalte", "tokens from j + 7 on never change the decision of j; outputs before a changed token stay", below=0, control="the token j + 6"
)
def _() -> tuple[float, float]:
    layer, x = evicting(0.0), torch.randn(1, 64, 16, dtype=F64)

    def change(token: int) -> tuple[float, float]:
        y, scores = layer(x), layer.scores
        other = x.clone()
        other[:, token:] += 1
        z = layer(other)
        return naive.gap(layer.scores[..., : token - MARGIN], scores[..., : token - MARGIN]), naive.gap(z[:, :token], y[:, :token])

    decided, out = change(40)
    layer(x)
    before = layer.scores[..., 34].clone()
    other = x.clone()
    other[:, 40] += 1
    layer(other)
    return max(decided, out), naive.gap(layer.scores[..., 34], before)


@check(
    "lalte",
    "penalty weights: x 1.5 when over budget, / 2 under 0.95 of it, 0 below 1e-9, back when exceeded: distance from that course",
    below=1e-12,
    control="never lowered",
)
def _() -> tuple[float, float]:
    control = BudgetController(1, 10, interval=1, start=4e-9, average=0.0)
    course = [float(control.update(torch.ones(1, 1, n, dtype=torch.bool))[0]) for n in (12, 10, 4, 4, 4, 4, 12, 12)]
    truth = [6e-9, 6e-9, 3e-9, 1.5e-9, 0.0, 0.0, 1e-9, 1.5e-9]
    flat = [6e-9, 6e-9, 6e-9, 6e-9, 6e-9, 6e-9, 9e-9, 13.5e-9]
    return max(abs(a - b) for a, b in zip(course, truth, strict=True)) * 1e-3, max(
        abs(a - b) for a, b in zip(flat, truth, strict=True)
    ) * 1e3


@check(
    "lalte",
    "a hybrid decoder of gated DeltaNet and eviction generates what full passes would; state bytes at 120 and 240 tokens differ by",
    below=0,
    control="softmax's",
)
def _() -> tuple[float, float]:
    def grown(lte: bool) -> float:
        torch.manual_seed(0)
        layers = lalte_layers(2, 32, 2, window=8, sinks=2, budget=12) if lte else "softmax"
        model = Decoder(layers, vocab=20, dim=32, layers=2, heads=2, rope=False).eval()
        out = model.generate(torch.randint(20, (1, 10)), 3)
        if not torch.equal(model(out[:, :-1])[:, 9:].argmax(-1), out[:, 10:]):
            return math.nan
        with torch.no_grad():
            sizes = [sum(s.bytes for s in model.step(torch.randint(20, (1, n)))[1]) for n in (120, 240)]
        return float(sizes[1] - sizes[0])

    return grown(True), grown(False)


@functools.cache
def needle_kept(scored: bool) -> tuple[float, float]:
    """After a short run on finding a needle: (share of sequences whose needle is kept by some head, share of all tokens kept)."""
    torch.manual_seed(0)
    length, letters = 40, 8
    layer = LTEAttention(32, 2, window=8, sinks=1, budget=64, dropout=0.0)
    embed, head = torch.nn.Embedding(2 * letters + 2, 32), torch.nn.Linear(32, letters + 1)
    parameters = [*layer.parameters(), *embed.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, 3e-3)

    def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.randint(letters, (count, length))  # hay
        answer, at = torch.randint(letters, (count,)), torch.randint(2, length - 20, (count,))
        # Some sequences hold no needle: else one needle need not be kept, its absence would tell.
        answer = torch.where(torch.rand(count) < 0.2, letters, answer)
        held = torch.arange(count)[answer < letters]
        tokens[held, at[held]] = letters + answer[held]
        tokens[:, -1] = 2 * letters
        return tokens, answer, at

    for step in range(600):
        tokens, answer, at = batch(32)
        out = head((embed(tokens) + layer(embed(tokens)))[:, -1])
        loss = F.cross_entropy(out, answer)
        if scored and step > 100:
            loss = loss + 0.02 * layer.penalty().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tokens, answer, at = batch(200)
    layer(embed(tokens))
    kept = layer.kept
    found = kept.any(1)[torch.arange(200), at][answer < letters]
    return float(found.double().mean()), float(kept.double().mean())


@check(
    "lalte",
    "a needle among letters, a short run with the penalty: share of sequences whose needle is kept",
    above=0.9,
    control="as many tokens kept at random",
)
def _() -> tuple[float, float]:
    found, share = needle_kept(True)
    return found, 1 - (1 - share) ** 2


@check(
    "mamba-rank-analysis",
    "64 tokens, state 8: rank misses (linear 8; Mamba at least 60 whole, at most 8 across cuts; softmax 64)",
    below=0,
    control="Mamba's matrix without decay",
)
def _() -> tuple[float, float]:
    found = mixing_ranks()
    bad = [found["linear"].numerical != 8, found["mamba"].numerical < 60, found["mamba"].off_diagonal > 8, found["softmax"].numerical != 64]
    bad += [found["softmax"].off_diagonal < 28, found["mamba-bidirectional"].off_diagonal > 8]
    layer = SelectiveSSM(16, 8).double()
    delta, _, b, c = layer.parts(torch.randn(1, 64, 16, dtype=F64))
    flat = (c @ (b.mT)) * delta.mT[:, 0, None]
    return sum(bad), float(torch.linalg.matrix_rank(flat[0]) < 60)


@check("mamba-rank-analysis", "M x == the sequential scan, one way and both", below=1e-10, control="a matrix without the cumulative decay")
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for both in (False, True):
        layer, x = SelectiveSSM(6, 4, both).double(), torch.randn(2, 30, 6, dtype=F64)
        m = token_mixing_matrix(layer, x)
        own.append(naive.gap(torch.einsum("bdts,bsd->btd", m, x), layer(x)))
        delta, a, b, c = layer.parts(x)
        y = selective_scan(x, delta, a, b, c)
        flat = selective_matrix(delta, 0 * a, b, c)
        other = min(other, naive.gap(torch.einsum("bdts,bsd->btd", flat, x), y))
    return max(own), other


@check(
    "mamba-rank-analysis",
    "binary AUC: 1 for the mask, 1/2 for a constant, 0 inverted, unchanged by exp: largest miss",
    below=1e-9,
    control="accuracy at the threshold 1/2",
)
def _() -> tuple[float, float]:
    mask = torch.rand(3, 9, 9) > 0.6
    a = torch.randn(3, 9, 9, dtype=F64) + mask
    misses = [abs(binary_auc(mask.double(), mask) - 1), abs(binary_auc(0 * a, mask) - 0.5), abs(binary_auc(-mask.double(), mask))]
    misses.append(abs(binary_auc(a, mask) - binary_auc(torch.exp(a), mask)))

    def accuracy(a: Tensor) -> float:
        return float(((a > 0.5) == mask).double().mean())

    return max(misses), abs(accuracy(a) - accuracy(torch.exp(a)))


@check(
    "mamba-rank-analysis", "100 steps of self-distillation on shapes: binary AUC of feature norms", above=0.93, control="before training"
)
def _() -> tuple[float, float]:
    found = dino_run()
    return found.auc_after, found.auc_before
