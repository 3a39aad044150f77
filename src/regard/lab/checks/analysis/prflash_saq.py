"""Checks of prflash-saq."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import regard
from regard.algebra import Harmonic, View, Weighted
from regard.cache.staircase import Staircase
from regard.engine.door import attend_with_stats
from regard.lab import naive
from regard.lab.checks.shared.byhand import rotary
from regard.lab.checks.shared.byte_pairs import cuts, longest_first, merged, words_of
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.staircases import BITS, EDGES, GROUP, PROMPT, STEPS, Watched, lowered, read_by, stair
from regard.lab.verification import check
from regard.search import Normal, cross_entropy
from regard.tasks.subwords import fitted, learn_subwords
from regard.zoo.analysis.prflash_saq import drawn, expected_density

ROW = "prflash-saq"


def chance(law: str, c: float, d: int) -> float:
    return 1.0 if d == 0 else min(1.0, c / (d + 1)) if law == "harmonic" else c**d


def penalty(way: str | None, s: Tensor, distance: int, slope: float) -> Tensor:
    if way == "additive":
        return s - slope * sum(1 / t for t in range(1, distance + 1))
    return s / (1 + distance) if way == "multiplicative" else s


def by_lots(q: Tensor, k: Tensor, v: Tensor, lots: Tensor, law: str, c: float, way: str | None, unbiased: bool, block: int) -> Tensor:
    """The row's formula, pair by pair. lots (H, blocks, blocks)."""
    first, slopes = k.shape[2] - q.shape[2], [2 ** (-8 * (h + 1) / q.shape[1]) for h in range(q.shape[1])]
    if way is not None:
        q, k = rotary(q, torch.arange(first, k.shape[2])), rotary(k, torch.arange(k.shape[2]))
    rows = []
    for b, h, n in itertools.product(*map(range, q.shape[:3])):
        i, scores, values = first + n, [], []
        for j in range(i + 1):
            d = i // block - j // block
            p = chance(law, c, d)
            if d == 0 or float(lots[h, i // block, j // block]) < p:
                s = penalty(way, q[b, h, n] @ k[b, h // (q.shape[1] // k.shape[1]), j] * q.shape[-1] ** -0.5, i - j, slopes[h])
                scores.append(s - math.log(p) if unbiased else s)
                values.append(v[b, h // (q.shape[1] // k.shape[1]), j])
        rows.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    return torch.stack(rows).view(*q.shape[:3], -1)


@check(
    "prflash-saq",
    "attention over kept blocks == pair by pair, with gradients: both laws, rotary with both penalties, exp(s) / p, grouped heads, "
    "9 to 13 queries over 29 keys in blocks of 8",
    below=1e-9,
    control="every block kept",
)
def _() -> tuple[float, float]:
    gaps, dense = [], []
    cases = (("harmonic", 1.4, None, False), ("geometric", 0.6, "additive", True), ("harmonic", 0.8, "multiplicative", True))
    for seed, (law, c, way, unbiased) in enumerate(cases):
        generator = torch.Generator().manual_seed(seed)
        shapes = ((2, 4, (11, 13, 9)[seed], 6), (2, 2, 29, 6), (2, 2, 29, 5))
        leaves = tuple(torch.randn(*shape, generator=generator, dtype=F64).requires_grad_() for shape in shapes)
        lots = torch.rand(4, 4, 4, generator=generator, dtype=F64)
        mechanism = regard.get(ROW, block_size=8, law=law, c=c, position=way, unbiased=unbiased)
        truth = by_lots(*leaves, lots, law, c, way, unbiased, 8)  # type: ignore[arg-type, misc]
        gaps.append(gap_with_gradients(regard.attend(*leaves, mechanism, draws=lots), truth, leaves))  # type: ignore[misc]
        dense.append(naive.gap(regard.attend(*leaves, mechanism, draws=0 * lots), truth))  # type: ignore[misc]
    return max(gaps), min(dense)


@check(
    "prflash-saq",
    "softmax with the penalty slope_h (1 + ... + 1/|i - j|) of ALiBi's slopes, both ways in time, and with slope 0 plain softmax",
    below=1e-12,
    control="the penalty linear in the distance",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 4, 23, 6, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in range(3))
    s, away = q @ k.mT * 6**-0.5, (torch.arange(23)[:, None] - torch.arange(23)).abs()
    sums = torch.tensor([sum(1 / t for t in range(1, n + 1)) for n in range(23)], dtype=F64)[away]
    slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(4)], dtype=F64)[:, None, None]
    truth, bare = ((s - m * sums).softmax(-1) @ v for m in (slopes, 0.0))
    found = regard.attend(q, k, v, Weighted(position=Harmonic()))
    flat = regard.attend(q, k, v, Weighted(position=Harmonic()), slopes=torch.zeros(4, dtype=F64))
    return max(naive.gap(found, truth), naive.gap(flat, bare)), naive.gap((s - slopes * away).softmax(-1) @ v, truth)


def lots_of(seed: int, blocks: int, heads: int = 2, law: str = "harmonic", c: float = 1.2) -> Tensor:
    """(heads, blocks, blocks) bool: what a seed keeps, in blocks of 2."""
    x = torch.zeros(1, heads, 2 * blocks, 2)
    view = View(0, lambda i: i, lambda a, b: (a, b), {})  # type: ignore[arg-type, return-value]
    return drawn(x, x, view, block=2, law=law, c=c, seed=seed, per_head=True).keep[0]


@check(
    "prflash-saq",
    "over 500 seeds of 4 heads: how often a distance is kept, in standard errors from p (the most over distances and laws; pairs of heads and of "
    "neighbouring blocks independent; never above the diagonal, the diagonal always)",
    below=3.5,
    control="a band of the same density",
)
def _() -> tuple[float, float]:
    blocks, worst, band = 7, 0.0, 0.0
    for law, c in (("harmonic", 1.2), ("geometric", 0.7)):
        kept = torch.stack([lots_of(seed, blocks, 4, law, c) for seed in range(500)]).double()
        if bool(kept.triu(1).any()) or not bool(kept.diagonal(dim1=-2, dim2=-1).all()):
            return math.inf, 0.0
        i, j = torch.arange(blocks)[:, None], torch.arange(blocks)
        for d in range(1, blocks):
            p = chance(law, c, d)
            error = math.sqrt(p * (1 - p) / (kept[:, :, 0, 0].numel() * (blocks - d)))
            worst = max(worst, abs(float(kept[..., i - j == d].mean()) - p) / error)
            band = max(band, abs(float(d < 3) - p) / error)
        z = (kept[:, :, 5, 2] - chance(law, c, 3)), (kept[:, :, 6, 3] - chance(law, c, 3))
        spread = chance(law, c, 3) * (1 - chance(law, c, 3)) / math.sqrt(len(kept))
        worst = max(worst, abs(float((z[0][:, 0] * z[0][:, 1]).mean())) / spread, abs(float((z[0][:, 0] * z[1][:, 0]).mean())) / spread)
    return worst, band


@check(
    "prflash-saq",
    "mean share of the triangle kept over 200 seeds of 4 heads against sum (n - d) p(d) / (n (n + 1) / 2)",
    below=0.004,
    control="p(0) not 1 but c / 2",
)
def _() -> tuple[float, float]:
    gaps, off = [], []
    for law, c in (("harmonic", 0.9), ("geometric", 0.5)):
        found = sum(float(lots_of(seed, 9, 4, law, c).double().sum()) for seed in range(200)) / (200 * 4 * 45)
        truth = sum((9 - d) * chance(law, c, d) for d in range(9)) / 45
        gaps += [abs(found - expected_density(9, law, c)), abs(truth - expected_density(9, law, c))]
        off.append(abs(found - truth + 9 * (1 - c / 2) / 45))
    return max(gaps), min(off)


@check(
    "prflash-saq",
    "unbiased: sums of exp(s) / p over kept blocks, mean over 100 draws of 4 heads, against all keys' (largest relative error over rows)",
    below=0.12,
    control="not divided by p",
)
def _() -> tuple[float, float]:
    q, k = (0.5 * torch.randn(1, 4, 24, 8, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in range(2))
    v = torch.ones(1, 4, 24, 1, dtype=F64)
    truth = (q @ k.mT * 8**-0.5).exp().tril().sum(-1)

    def off(unbiased: bool) -> float:
        total, generator = torch.zeros_like(truth), torch.Generator().manual_seed(0)
        mechanism = regard.get(ROW, block_size=8, unbiased=unbiased)
        for _ in range(100):
            _, stats = attend_with_stats(q, k, v, mechanism, draws=torch.rand(4, 3, 3, generator=generator))
            total += (stats.shift.exp() * stats.total).view_as(total)
        return float(((total / 100).mean((0, 1)) / truth.mean((0, 1)) - 1).abs().max())

    return off(True), off(False)


@check("prflash-saq", "p = 1 everywhere == dense causal softmax, 256 tokens in blocks of 32", below=1e-10, control="c = 0.5")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 256, 8, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in range(3))
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    kept, thinned = (regard.attend(q, k, v, regard.get(ROW, block_size=32, law="geometric", c=c)) for c in (1.0, 0.5))
    return naive.gap(kept, truth), naive.gap(thinned, truth)


@check(
    "prflash-saq",
    "staircase of 16, 8, 4, 2 bits: what each of 14 steps reads == groups rounded by loops as they age (MQA and two key heads)",
    below=1e-9,
    control="8 bits at every age",
)
def _() -> tuple[float, float]:
    gaps, level = [], []
    for kv_heads in (1, 2):
        policy, keys, values, _ = read_by(Watched(BITS, EDGES, GROUP), kv_heads)
        now, before = {True: keys.clone(), False: values.clone()}, [0] * 20
        flat = keys.clone()
        for call, read in enumerate(policy.reads[1:], 1):
            seen = PROMPT + call - 1  # when what this call reads was stored
            for group in range(seen // GROUP):
                at, to = slice(group * GROUP, (group + 1) * GROUP), stair(group, seen)
                if to != before[group]:
                    for (kind, x), b, h in itertools.product(now.items(), range(2), range(kv_heads)):
                        x[b, h, at] = lowered(x[b, h, at], BITS[to], GROUP, kind)
                        if kind and before[group] == 0:
                            flat[b, h, at] = lowered(flat[b, h, at], 8, GROUP, True)
                before[group] = to
            gaps += [naive.gap(own, now[kind][:, :, : seen + 1]) for kind, own in ((True, read.keys), (False, read.values))]
            level.append(naive.gap(read.keys, flat[:, :, : seen + 1]))
    return max(gaps), min(level)


@check(
    "prflash-saq",
    "errors grow with age: mean |read - exact| of keys and values, the least ratio from one stair to the next",
    above=2.0,
    control="2 bits at every age",
)
def _() -> tuple[float, float]:
    def ratio(policy: Any) -> float:
        found, keys, values, _ = read_by(policy)
        read, seen = found.reads[-1], PROMPT + STEPS - 1
        kept = [[g for g in range(seen // GROUP) if stair(g, seen) == n] for n in range(1, 4)]
        ratios = []
        for own, exact in ((read.keys, keys), (read.values, values)):
            off = (own - exact).abs().unflatten(2, (-1, GROUP)).mean((0, 1, 3, 4))
            mean = [float(off[groups].mean()) for groups in kept]
            ratios += [b / a for a, b in itertools.pairwise(mean)]
        return min(ratios)

    return ratio(Watched(BITS, EDGES, GROUP)), ratio(Watched((16, 2), (0,), GROUP))


@check(
    "prflash-saq",
    "bytes of the cache == the sum of bits, steps and lows of every stair, over the same in full precision",
    below=0.7,
    control="16 bits alone",
)
def _() -> tuple[float, float]:
    _, keys, _, cache = read_by(Watched(BITS, EDGES, GROUP))
    rows, dim, total, seen = 2, keys.shape[-1], 0.0, PROMPT + STEPS
    stairs = [stair(group, seen) for group in range(seen // GROUP)]
    for n in stairs:
        if n:
            total += rows * GROUP * 2 * dim * BITS[n] / 8  # codes
            total += (
                rows * 2 * 8 * (dim + GROUP * dim // GROUP)
            )  # float64 steps and lows: a channel of keys, a group of each token's values
    total += rows * (seen - GROUP * sum(n > 0 for n in stairs)) * 2 * dim * 8
    whole = 2.0 * rows * seen * dim * 8
    _, _, _, plain = read_by(Watched((16,), (), GROUP))
    return (Staircase.held(cache) / whole if Staircase.held(cache) == total else math.inf), Staircase.held(plain) / whole


@check(
    "prflash-saq",
    "attention's outputs of the last step: error of the staircase over that of 2 bits at every age",
    below=0.8,
    control="1 bit at every age",
)
def _() -> tuple[float, float]:
    def off(*options: Any) -> float:
        policy, keys, values, _ = read_by(Watched(*options))
        q, read = torch.randn(2, 8, 16, keys.shape[-1], dtype=F64, generator=torch.Generator().manual_seed(7)), policy.reads[-1]
        own, truth = (regard.attend(q, k, v) for k, v in ((read.keys, read.values), (keys, values)))
        return float((own - truth).norm())

    base = off((16, 2), (0,), GROUP)
    return off(BITS, EDGES, GROUP) / base, off((16, 1), (0,), GROUP) / base


@check(
    "prflash-saq",
    "sub-words of byte-pair encoding's own vocabulary: log P of the found cut is the best of all cuts and no word's is below byte-pair's (the least)",
    above=-1e-9,
    control="the longest piece first",
)
def _() -> tuple[float, float]:
    words = words_of(12_000)
    pairs, pieces = merged(words, 150)
    counts: Counter[str] = Counter()
    for word, own in pairs.items():
        for piece in own:
            counts[piece] += words[word]
    model = fitted(words, {piece: float(counts[piece]) for piece in pieces})
    known = set(model.log_p)
    best = {w: max(model.log_likelihood(c) for c in cuts(w, known)) for w in list(words)[:60]}
    wrong = max(abs(model.log_likelihood(model.segment(w)) - value) for w, value in best.items())

    def least(cut: Callable[[str], list[str]]) -> float:
        return min(model.log_likelihood(cut(word)) - model.log_likelihood(own) for word, own in pairs.items())

    return least(model.segment) - wrong, least(lambda word: longest_first(word, known))


@check(
    "prflash-saq",
    "150 learned pieces: log P of the words over that of byte-pair encoding's 150 with their best cuts (both negative)",
    below=0.95,
    control="the 150 commonest substrings",
)
def _() -> tuple[float, float]:
    words = words_of(12_000)
    characters = {c for word in words for c in word}
    base = fitted(words, dict.fromkeys(merged(words, 150)[1], 1.0))
    learned = learn_subwords(words, 150)
    common: Counter[str] = Counter()
    for word, count in words.items():
        for start, end in itertools.combinations(range(len(word) + 1), 2):
            common[word[start:end]] += count * (end - start > 1)
    rest = [piece for piece, _ in common.most_common(150 - len(characters))]
    plain = fitted(words, dict.fromkeys([*characters, *rest], 1.0))
    sizes = {len(model.log_p) for model in (base, learned, plain)}
    total = abs(sum(math.exp(x) for x in learned.log_p.values()) - 1)
    return learned.corpus(words) / base.corpus(words) if sizes == {150} and total < 1e-9 else 1.0, plain.corpus(words) / base.corpus(words)


@check(
    "prflash-saq",
    "cross-entropy method: cost of the best of 30 rounds of 100 on a quadratic of three parameters (the worst of three seeds)",
    below=1e-2,
    control="nothing refitted",
)
def _() -> tuple[float, float]:
    def cost(x: dict[str, float]) -> float:
        return (x["a"] - 3) ** 2 + 2 * (x["b"] + 1.5) ** 2 + 0.5 * (x["c"] - x["a"]) ** 2

    space = {name: Normal(0.0, 4.0) for name in "abc"}
    found = [cross_entropy(cost, space, samples=100, rounds=30, patience=30, seed=seed).value for seed in range(3)]
    still = [cross_entropy(cost, space, samples=100, rounds=30, patience=30, smoothing=1e-12, seed=seed).value for seed in range(3)]
    return max(found), sorted(still)[1]
