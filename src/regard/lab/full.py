"""Theory at the papers' size: `regard verify SLUG --full` runs what a row's checks run small, and prints what came out. Nothing is asserted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RegardError
from ..interpret.sinks import sink_report
from ..nn import NormalizedAttention
from ..tasks.backcopy import backcopy
from ..tasks.facts import Facts
from ..tasks.item_labels import item_labels
from ..zoo.analysis.abrupt_icl import emergence
from ..zoo.analysis.active_dormant_heads import train_backcopy
from ..zoo.analysis.attention_svm import descend, draw_problem
from ..zoo.analysis.benefits_of_rank import rank_benefit
from ..zoo.analysis.deceptive_attention import train_translator
from ..zoo.analysis.dsf import recall_accuracy
from ..zoo.analysis.filter_and_store import acquire
from ..zoo.analysis.fixed_head_size import low_rank_bottleneck
from ..zoo.analysis.icl_linear_regression import head_pattern, train_regression
from ..zoo.analysis.icl_softmax_regression import trained_closeness
from ..zoo.analysis.mha_memorization_capacity import examples, memorise
from ..zoo.analysis.random_feature_attention import RandomFeatureAttention, RandomFeatureMLP, Ridge, drawn, sample_complexity_curve
from ..zoo.analysis.rank_one_universal import OneLayer, fit_sequences
from ..zoo.analysis.scan_snap import scan_and_snap, scan_data
from ..zoo.analysis.superiority_of_softmax import softmax_vs_linear

Lines = Iterable[tuple[str, float]]


@dataclass(frozen=True)
class Full:
    """what: is run, at which sizes. hours: about, of one core. run: steps or samples of each training (None: the paper's) -> lines."""

    what: str
    hours: float
    run: Callable[[int | None], Lines]


def some(name: str, small: int | None) -> dict[str, Any]:
    return {} if small is None else {name: small}


def abrupt(small: int | None) -> Lines:
    every = {} if small is None else {"every": max(1, small // 2), "count": 20}
    found = emergence(item_labels(2048), **some("steps", small), **every)
    for name, values in found.measures.items():
        yield f"{name}, at the end", values[-1]


def dormant(small: int | None) -> Lines:
    task = backcopy()
    for attention in ("softmax", "relu"):
        model = train_backcopy(task, attention, **some("steps", small))
        ids = task.draw(16, 256, torch.Generator().manual_seed(1))
        report = sink_report(model, ids[:, :-1], torch.isin(ids[:, :-1], task.triggers), logits=False)
        yield f"{attention}: weight on the first token on dormant rows", float(report.dormant.scores[0, 0])
        yield f"{attention}: length of the first token's value over the others'", float(report.value.scores[0, 0])


def svm(small: int | None) -> Lines:
    for seed in range(3 if small is None else 1):
        run = descend(draw_problem(6, 8, 10, seed=seed), **some("steps", small))
        yield f"problem {seed}: cosine of the weights with the SVM's", run.correlation[-1]


def rank(small: int | None) -> Lines:
    table = rank_benefit((1, 2, 4, 8), (16, 64, 256), points=(2, 4, 8), dims=(8, 16), **some("samples", small))
    for (r, heads, points, dim), error in table.errors.items():
        yield f"rank {r}, {heads} heads, {points} points, {dim} dimensions: error", error


def recall(small: int | None) -> Lines:
    for state in (32, 128):
        for length, pairs in ((64, 4), (128, 8)):
            layer = functools.partial(NormalizedAttention, 64, key_dim=state)
            right = recall_accuracy(layer, length=length, pairs=pairs, **some("steps", small))
            yield f"state expansion {state}, length {length}, {pairs} pairs: recall", right


def store(small: int | None) -> Lines:
    for multiplicity in (1, 4, 12):
        for share in (0.1, 0.5, 0.9):
            steps = {} if small is None else {"steps": (small, small)}
            found = acquire(Facts(multiplicity=multiplicity), share, **steps)  # type: ignore[arg-type]
            yield f"stated {multiplicity} ways, {share:.0%} fine-tuned: facts of others extracted", found.unseen


def regression(small: int | None) -> Lines:
    for heads in (1, 2, 4):
        pattern = head_pattern(train_regression(heads, **some("steps", small)))
        yield f"{heads} heads: largest entry off the diagonal over the diagonal", pattern.off
        yield f"{heads} heads: |sum of mu| over the largest", pattern.balance


def memory(small: int | None) -> Lines:
    for heads in (5, 20):
        for n in (8, 32):
            count = 2000 if small is None else 50
            queries, contexts = examples(count, n)
            labels = torch.randint(100, (count,), generator=torch.Generator().manual_seed(0))
            found = memorise(queries, contexts, labels, heads=heads, **some("steps", small))
            yield f"{heads} heads, contexts of {n}: of {found.of} examples known", float(found.count)


def scan(small: int | None) -> Lines:
    run = scan_and_snap(scan_data(), **some("steps", small), **({} if small is None else {"every": 1}))
    begin, snap = run.phases()
    yield from (("scan begins at step", float(begin)), ("snap at step", float(snap)))
    yield "attention on common tokens at the end", float(run.common_mass()[-1])


def margins(small: int | None) -> Lines:
    found = softmax_vs_linear(**some("draws", small))
    for name, values in found.margin.items():
        yield from ((f"{name}: margin at {n} keys", value) for n, value in zip(found.lengths, values, strict=True))


def features(small: int | None) -> Lines:
    heads, sizes = (1000, (250, 1000, 4000)) if small is None else (4, (8 * small,))
    for name in ("f1", "f2", "f3"):
        train, test = drawn(name, max(sizes), seed=1), drawn(name, 2000, seed=2)
        models: dict[str, Ridge] = {
            "attention": RandomFeatureAttention(16, heads),
            "biased attention": RandomFeatureAttention(16, heads, bias=1.0),
            "MLP": RandomFeatureMLP(16, 16, heads),
        }
        for kind, model in models.items():
            found = sample_complexity_curve(model, train, test, sizes)
            yield from ((f"{name}, {kind}, {n} examples: error over variance", x) for n, x in zip(sizes, found.errors, strict=True))


def bottleneck(small: int | None) -> Lines:
    draw = torch.Generator().manual_seed(0)
    x, target = (torch.randn(32, n, generator=draw, dtype=torch.float64) for n in (64, 32))
    for size in (4, 8, 16, 32):
        found = low_rank_bottleneck(x, (3 * target).softmax(-1), size, **some("steps", small))
        yield f"heads of {size} channels, 32 tokens: largest error of a weight", found.error


def softmax_regression(small: int | None) -> Lines:
    for n in (16, 64, 256):
        for dim in (4, 8):
            found = trained_closeness(n, dim, **some("steps", small))
            yield from (
                (f"{n} pairs in {dim} dimensions: {name}", found[name]) for name in ("error", "descent", "mean", "difference", "cosine")
            )


def universal(small: int | None) -> Lines:
    draw = torch.Generator().manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(12, 8, generator=draw), dim=1)
    for count in (32, 128, 512):
        ids = torch.stack([torch.randperm(12, generator=draw)[:6] for _ in range(count)])
        keys, at = ids.sort(-1).values.unique(dim=0, return_inverse=True)
        labels = torch.randint(3, (len(keys), 12), generator=draw)[at].gather(1, ids)
        for attention in (True, False):
            torch.manual_seed(0)
            model = OneLayer(8, 32, 3, 256, attention)
            right = fit_sequences(model, words[ids].transpose(1, 2), labels, **some("steps", small)).right
            assert right is not None
            yield f"{count} sequences of 6 tokens, {'one rank-one attention' if attention else 'without attention'}: labels right", right


def deception(small: int | None) -> Lines:
    for kind in ("flip", "copy", "reverse") if small is None else ("flip",):
        for name, lam, attention in (
            ("lam 0", 0.0, "learned"),
            ("lam 0.1", 0.1, "learned"),
            ("lam 1", 1.0, "learned"),
            ("uniform", 0.0, "uniform"),
            ("none", 0.0, "none"),
        ):
            size = {"length": 12, "vocab": 32, "dim": 64, "steps": 600 if small is None else small}
            right, mass = train_translator(kind, lam, attention, **size)  # type: ignore[arg-type]
            yield from ((f"{kind}, {name}: words right", right), (f"{kind}, {name}: attention on the aligned word", mass))


FULL: dict[str, Full] = {
    "abrupt-icl": Full("two attention layers, 200,000 steps of 128 bursty sequences of 8 pairs, 2048 classes", 20, abrupt),
    "active-dormant-heads": Full("one layer of width 256 with softmax and with ReLU, 10,000 steps of 512 sequences of 256", 100, dormant),
    "attention-svm": Full("three problems of 6 inputs of 8 tokens in 10 dimensions", 0.003, svm),
    "benefits-of-rank": Full("ranks 1 to 8, 16 to 256 heads, 2 to 8 points in 8 and 16 dimensions, 20,000 samples", 0.1, rank),
    "deceptive-attention": Full("translators of 12 words out of 32, three orders, five ways to attend, 600 steps", 0.1, deception),
    "dsf": Full("two layers of width 64, vocabulary 8192, 10,000 steps of 64 sequences", 30, recall),
    "filter-and-store": Full("64 subjects, 24 paraphrases, 800 and 400 steps, nine settings", 0.2, store),
    "fixed-head-size": Full("32 tokens in 64 dimensions, heads of 4 to 32 channels", 0.02, bottleneck),
    "icl-linear-regression": Full("1, 2 and 4 heads, 5 dimensions, 40 examples, 3000 steps of 256", 0.016, regression),
    "icl-softmax-regression": Full("16 to 256 pairs in 4 and 8 dimensions, 300 steps of 128", 0.03, softmax_regression),
    "mha-memorization-capacity": Full("5 and 20 heads, contexts of 8 and 32 in 64 dimensions, 2000 examples of 100 classes", 0.3, memory),
    "random-feature-attention": Full("1000 heads, 16 keys in 16 dimensions, three targets, 250 to 4000 examples", 0.05, features),
    "rank-one-universal": Full("32 to 512 sequences of 6 of 12 tokens, width 256, 1500 steps", 0.05, universal),
    "scan-snap": Full("sequences of 128, 1000 steps of 512", 0.004, scan),
    "superiority-of-softmax": Full("64 to 4096 keys, 200 draws", 0.003, margins),
}


def full(slug: str, small: int | None = None) -> Lines:
    """Lines (what, number) of a row at its paper's size, as they come; small: so many steps or samples instead. RegardError for rows without."""
    if slug not in FULL:
        raise RegardError(f"{slug!r} has no run at its paper's size beside its checks; there are: {', '.join(FULL)}")
    torch.manual_seed(0)
    return FULL[slug].run(small)
