"""Vocabularies and directions that do not fit."""

import math

import pytest
import torch

import regard
from regard.zoo.analysis import rank_one_universal
from regard.zoo.analysis.rank_one_universal import (
    OneLayer,
    RankOneAttention,
    collisions,
    contextual_mapping,
    fit_sequences,
    telling,
)


def test_vocabularies_that_cannot_be_told_apart_are_refused():
    with pytest.raises(regard.RegardError, match="one token twice"):
        telling(torch.ones(3, 4))
    with pytest.raises(regard.RegardError, match="direction"):
        RankOneAttention(4, torch.ones(3))


def test_directions_tell_all_pairs_apart_and_are_drawn_until_they_do():
    vocabulary = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for seed in range(5):
        v = telling(vocabulary, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(100):
            drawn = torch.randn(5, generator=generator, dtype=torch.float64)
            drawn = drawn / drawn.norm()
            shares = [abs(float((a - b) @ drawn)) / float((a - b).norm()) for i, a in enumerate(vocabulary) for b in vocabulary[:i]]
            if min(shares) >= math.sqrt(8 / (math.pi * 5)) / 144:
                break
        assert torch.allclose(v, drawn)
    close = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(n)) for n in range(60)])
    found = []
    for seed in range(30):
        try:
            telling(close, 1, seed)
        except regard.RegardError as why:
            found.append(str(why))
    assert found and all("in 1 draws" in one for one in found)
    telling(close, 2000)


def test_layers_begin_as_they_are_asked_to():
    v, out = (torch.nn.functional.normalize(torch.randn(4), dim=0) for _ in range(2))
    for layer, scale, last in ((RankOneAttention(4, v, 3.0, out), 3.0, out), (RankOneAttention(4, v), 1.0, v)):
        for name, left in (("k", v), ("q", scale * v), ("v", v), ("o", last)):
            assert torch.allclose(layer.matrix(name), left[:, None] * v)
    drawn = [RankOneAttention(4, seed=seed).left["k"] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and float(drawn[0].norm()) == pytest.approx(1)
    layer = contextual_mapping(torch.randn(6, 4, dtype=torch.float64), 2.0, True, seed=3)
    assert layer.hard and torch.allclose(layer.matrix("q"), 2 * layer.matrix("k")) and layer.left["k"].dtype == torch.float64


def test_both_forms_by_hand():
    for hard in (False, True):
        layer, x = RankOneAttention(4, hard=hard).double(), torch.randn(2, 4, 5, dtype=torch.float64)
        x[:, :, 3] = x[:, :, 1]  # two keys of one score
        k, q, v, o = (layer.matrix(name) for name in "kqvo")
        for b in range(2):
            for j in range(5):
                s = torch.stack([(k @ x[b, :, i]) @ (q @ x[b, :, j]) for i in range(5)])
                w = (s == s.max()).double() if hard else s.exp()
                truth = x[b, :, j] + o @ sum(w[i] / w.sum() * (v @ x[b, :, i]) for i in range(5))
                assert torch.allclose(layer(x)[b, :, j], truth)
    model, x = OneLayer(3, 4, 2, 6, attention=False), torch.randn(2, 3, 5)
    assert torch.allclose(model(x), model.last(model.first(x.mT)).mT) and OneLayer(3, 4, 2, 6, hard=True).attention.hard


def test_collisions_and_fits_are_counted_by_hand(monkeypatch):
    vocabulary = torch.randn(4, 3, dtype=torch.float64)
    layer, ids = RankOneAttention(3).double(), torch.tensor([[0, 1], [1, 0], [0, 2], [3, 2]])
    out = layer(vocabulary[ids].mT).mT.flatten(0, 1)
    kept = [(int(t), tuple(sorted(row.tolist()))) for row in ids for t in row]
    pairs = [(i, j, float((out[i] - out[j]).norm())) for i in range(8) for j in range(i)]
    different = [d for i, j, d in pairs if kept[i] != kept[j]]
    alike = [d for i, j, d in pairs if kept[i] == kept[j]]
    for tol in (1e-9, sorted(different)[5]):
        count, least, greatest = collisions(layer, vocabulary, ids, tol)
        assert count == sum(d < tol - 1e-12 for d in different) or abs(count - sum(d < tol for d in different)) <= 1
        assert least == pytest.approx(min(different)) and greatest == pytest.approx(max(alike), abs=1e-9)
    monkeypatch.setattr(rank_one_universal, "fit", lambda *given, **options: [2.0])
    model, x = OneLayer(3, 4, 2, 6), torch.randn(6, 3, 5)
    labels, numbers = torch.randint(2, (6, 5)), torch.randn(6, 2, 5)
    found = fit_sequences(model, x, labels), fit_sequences(model, x, numbers)
    assert found[0].right == pytest.approx(float((model(x).argmax(1) == labels).double().mean())) and found[0].error is None
    error = (model(x) - numbers).square().mean() / (numbers - numbers.mean()).square().mean()
    assert found[1].error == pytest.approx(float(error)) and found[1].right is None and found[1].loss == (2.0,)
