"""Experiments train by the recipe they were given: what reaches the optimizer, what is drawn, what the first loss is, and that seeds are of one run."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.tasks.backcopy import backcopy
from regard.tasks.facts import Facts
from regard.tasks.item_labels import item_labels
from regard.zoo.analysis import (
    abrupt_icl,
    active_dormant_heads,
    cab,
    deceptive_attention,
    dsf,
    filter_and_store,
    graph_attention_windows_in_llms,
    icl_linear_regression,
    icl_softmax_regression,
    mha_memorization_capacity,
    rank_one_universal,
)

GIVEN = {"steps": 5, "lr": 0.25, "seed": 3}
RECIPE = {"lr": 0.25, "seed": 3}
ITEMS = item_labels(8, 8, 6, torch.Generator().manual_seed(0), slots=2, novel=8)
POINTS = torch.randn(9, 4), torch.randn(9, 5, 4), torch.randint(3, (9,))
SEQUENCES = torch.randn(4, 3, 5), torch.randn(4, 2, 5)


def one_layer():
    torch.manual_seed(0)
    return rank_one_universal.OneLayer(3, 4, 2, 6)


def words(model, drawn):
    """Next-token loss of tokens (B, n + 1)."""
    return F.cross_entropy(model(drawn[:, :-1]).flatten(0, 1), drawn[:, 1:].flatten())


def squared(model, drawn):
    return (model(*drawn[:3]) - drawn[3]).square().mean()


def translated(model, drawn):
    """lam -log of what is left to other words, beside the words' cross-entropy."""
    logits, alpha = model(*drawn[:2])
    left = 1 - (alpha * drawn[2]).sum(-1)
    return F.cross_entropy(logits.flatten(0, 1), drawn[1].flatten()) - 0.5 * torch.log(left + 1e-12).mean()


def task():
    return next(cell for (name, pattern), cell in cab.tasks(64).items() if pattern == "causal self" and name == "language")


# module, call, what the optimizer is told, shapes of the first thing drawn, its loss by hand
RUNS = {
    "abrupt-icl": (
        abrupt_icl,
        lambda **o: abrupt_icl.emergence(ITEMS, pairs=2, copies=1, batch=7, count=3, weight_decay=0.5, optimizer="adam", **o),
        {"optimizer": "adam", "weight_decay": 0.5},
        lambda a: a.tokens.shape == (7, 5, ITEMS.width),
        lambda m, a: F.cross_entropy(m(a.tokens), a.label),
    ),
    "active-dormant-heads": (
        active_dormant_heads,
        lambda **o: active_dormant_heads.train_backcopy(backcopy(), length=6, dim=8, batch=7, weight_decay=0.5, **o),
        {"optimizer": "adamw", "weight_decay": 0.5, "betas": (0.9, 0.99)},
        lambda ids: ids.shape == (7, 7),
        words,
    ),
    "active-dormant-heads sgd": (
        active_dormant_heads,
        lambda **o: active_dormant_heads.train_backcopy(backcopy(), length=6, dim=8, batch=7, optimizer="sgd", **o),
        {"optimizer": "sgd", "weight_decay": 1e-4, "momentum": 0.9},
        lambda ids: ids.shape == (7, 7),
        words,
    ),
    "cab": (
        cab,
        lambda steps, lr, seed: cab.trained("softmax", task(), "causal self", seed, steps, 7, lr, 64, dim=8, heads=2, depth=1),
        {},
        lambda drawn: len(drawn.target) == 7,
        lambda m, drawn: task().loss(m(drawn.source, drawn.target), drawn),
    ),
    "deceptive-attention": (
        deceptive_attention,
        lambda **o: deceptive_attention.train_translator("copy", 0.5, length=5, vocab=6, dim=8, batch=7, **o),
        {},
        lambda drawn: drawn[0].shape == (7, 5) and int(drawn[0].max()) == 5,
        translated,
    ),
    "dsf": (
        dsf,
        lambda **o: dsf.recall_accuracy(nn.Identity, dim=8, layers=1, length=32, pairs=2, vocab=64, batch=7, **o),
        {},
        lambda drawn: drawn[0].shape == (7, 32),
        lambda m, drawn: F.cross_entropy(m(drawn[0]).flatten(0, 1), drawn[1].flatten(), ignore_index=-100),
    ),
    "filter-and-store": (
        filter_and_store,
        lambda steps, lr, seed: filter_and_store.acquire(
            Facts(6, 3, 4, 2, 2), dim=8, hidden=6, batch=7, steps=(steps, 1), lr=(lr, 1), seed=seed
        ),
        {},
        lambda drawn: len(drawn[0]) == 7,
        lambda m, drawn: F.cross_entropy(m(drawn[0]), drawn[1]),
    ),
    "graph-attention-windows-in-llms": (
        graph_attention_windows_in_llms,
        lambda **o: graph_attention_windows_in_llms.window_experiment(1, graphs=(20, 3), batch=7, **o),
        {},
        lambda rows: rows.shape == (7,) and int(rows.max()) < 20,
        None,
    ),
    "icl-linear-regression": (
        icl_linear_regression,
        lambda **o: icl_linear_regression.train_regression(2, 3, 9, sigma=0.0, tasks=2, batch=7, **o),
        {},
        lambda p: p[0].shape == (7, 9, 3) and p[1].shape == (7, 9, 2),
        squared,
    ),
    "icl-softmax-regression": (
        icl_softmax_regression,
        lambda **o: icl_softmax_regression.trained_closeness(9, 3, batch=7, **o),
        {},
        lambda p: p[0].shape == (7, 9, 3),
        squared,
    ),
    "mha-memorization-capacity": (
        mha_memorization_capacity,
        lambda **o: mha_memorization_capacity.memorise(*POINTS, heads=2, classes=3, batch=7, **o),
        {},
        lambda rows: rows.shape == (7,) and int(rows.max()) < 9,
        lambda m, rows: F.cross_entropy(m(POINTS[0][rows], POINTS[1][rows]), POINTS[2][rows]),
    ),
    "rank-one-universal": (
        rank_one_universal,
        lambda **o: rank_one_universal.fit_sequences(one_layer(), *SEQUENCES, **o),
        {},
        lambda nothing: nothing is None,
        lambda m, _: (m(SEQUENCES[0]) - SEQUENCES[1]).square().mean(),
    ),
}


class Enough(Exception):
    """The first call of the trainer has been seen."""


@pytest.mark.parametrize("name", RUNS)
def test_recipe(name, monkeypatch):
    module, call, told, fits, loss_by_hand = RUNS[name]
    seen = []

    def fit(model, draw, loss, steps, watch=None, **options):
        drawn = draw(torch.Generator().manual_seed(1))
        seen.append((model, drawn, loss(drawn).item(), steps, options))
        raise Enough

    monkeypatch.setattr(module, "fit", fit)
    for seed in (3, 3, 4):
        with pytest.raises(Enough):
            call(**{**GIVEN, "seed": seed})
    model, drawn, loss, steps, options = seen[0]
    assert (steps, options) == (5, {**RECIPE, **told}) and fits(drawn) and math.isfinite(loss)
    if loss_by_hand is not None:
        assert loss == pytest.approx(float(loss_by_hand(model, drawn)), rel=1e-5)
    assert loss == seen[1][2]
    if name not in ("rank-one-universal", "icl-softmax-regression"):  # whose model is given, or draws nothing
        assert loss != seen[2][2]
