"""Examples, memory and the bound."""

import pytest
import torch

import regard
from regard.zoo.analysis import mha_memorization_capacity
from regard.zoo.analysis.mha_memorization_capacity import MemoryAttention, bound, capacity, examples, kruskal_rank, memorise, saturation


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: examples(3, 4, contexts="same"), "contexts"),
        (lambda: examples(3, 9, contexts="permuted", bag=8), "bag"),
        (lambda: MemoryAttention(weights="relu"), "weights"),
        (lambda: MemoryAttention(4, 2, value_dim=2).solve(torch.ones(2, 4), torch.ones(2, 3, 4), torch.ones(2)), "value_dim=1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_numbers_are_memorised_and_capacity_is_the_theorem_s():
    queries, contexts = examples(12, 6, 8)
    found = memorise(queries, contexts, torch.rand(12), heads=6, classes=None, steps=300, lr=1e-2, close=0.1)
    assert found.count == 12 and found.saturated.shape == (6,) and len(found.loss) == 300
    assert capacity([3, 7, 8, 12], 4, 6, 2) == 7


def test_kruskal_ranks_of_known_rows():
    eye = torch.eye(5, dtype=torch.float64)
    assert kruskal_rank(eye) == 5 and kruskal_rank(eye, at_most=3) == 3
    assert kruskal_rank(torch.cat((eye, eye[:1]))) == 1  # two rows alike
    plane = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    assert kruskal_rank(plane) == 2 and kruskal_rank(torch.zeros(3, 3, dtype=torch.float64)) == 0
    late = torch.cat(
        (torch.randn(60, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64))
    )
    assert kruskal_rank(late, tries=1) == 0  # runs side by side are looked at too


def test_layers_by_hand():
    for options in ({}, {"key_dim": 3, "value_dim": 2, "model_dim": 5, "outputs": 4, "weights": "sigmoid", "scale": 0.7}):
        model = MemoryAttention(6, 2, **options).double()
        queries, contexts = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
        read, weights = [], []
        for h in range(2):
            s = torch.einsum("be,bne->bn", queries @ model.q[h].T, contexts @ model.k[h].T) * options.get("scale", 6**-0.5)
            w = s.sigmoid() if options else s.softmax(1)
            weights.append(w)
            read.append(torch.einsum("bn,bnd->bd", w, contexts) @ model.v[h].T)
        out = torch.cat(read, 1) @ model.out.weight.T
        out = out @ model.readout.weight.T + model.readout.bias if options else out
        assert torch.allclose(model(queries, contexts), out) and model.q.shape == (2, options.get("key_dim", 6), 6)
        for level in (0.3, 0.6):
            truth = torch.stack([(w.max(1).values > level).double().mean() for w in weights])
            assert torch.equal(saturation(model, queries, contexts, level), truth)
    assert torch.equal(saturation(model, queries, contexts), saturation(model, queries, contexts, 0.99))
    torch.manual_seed(0)
    wide = MemoryAttention(64, 20)
    assert all(abs(float(p.std()) * 8 - 1) < 0.1 for p in (wide.q, wide.k, wide.v)) and wide.v.shape == (20, 1, 64)


def test_what_is_memorised_is_counted_by_hand(monkeypatch):
    seen = []
    monkeypatch.setattr(mha_memorization_capacity, "fit", lambda model, *given, **options: seen.append(model) or [1.0])
    queries, contexts = examples(30, 4, 6, "random")
    for labels, options in ((torch.randint(3, (30,)), {"classes": 3}), (0.1 * torch.randn(30), {"classes": None, "close": 0.2})):
        found = memorise(queries, contexts, labels, heads=2, **options)
        out = seen[-1](queries, contexts)
        right = out.argmax(1) == labels if options["classes"] else (out[:, 0] - labels).abs() < 0.2
        assert (found.count, found.of, found.loss) == (int(right.sum()), 30, (1.0,)) and 0 < found.count < 30
        assert torch.equal(found.saturated, saturation(seen[-1], queries, contexts)) and seen[-1].out.out_features == 6
    assert capacity([2, 4, 30], 2, 3, 2, tol=1e-6) in (2, 4) and capacity([2, 4, 30], 2, 3, 2, tol=1e6) == 30
    assert capacity([2], 2, 3, 2, tol=0.0) == 0


def test_contexts_of_every_kind():
    for kind in ("random", "shared", "permuted"):
        queries, contexts = examples(200, 3, 4, kind, bag=7, seed=2, dtype=torch.float64)
        assert queries.shape == (200, 4) and contexts.shape == (200, 3, 4) and queries.dtype == contexts.dtype == torch.float64
        for x in (queries, contexts):
            assert float(x.min()) >= 0 and float(x.max()) < 1
        assert float(queries.mean()) == pytest.approx(0.5, abs=0.05) and float(queries.var()) == pytest.approx(1 / 12, rel=0.1)
        again, other = (examples(200, 3, 4, kind, bag=7, seed=s, dtype=torch.float64)[1] for s in (2, 3))
        assert torch.equal(again, contexts) and not torch.equal(other, contexts)
        tokens = {tuple(token) for row in contexts.tolist() for token in row}
        rows = [tuple(map(tuple, row)) for row in contexts.tolist()]
        if kind == "random":
            assert len(tokens) == 600
        elif kind == "shared":
            assert set(rows) == {rows[0]} and len(tokens) == 3
        else:
            assert len(tokens) == 7 and all(len(set(row)) == 3 for row in rows) and len(set(rows)) > 100
            firsts = [sum(row[0] == token for row in rows) for token in tokens]
            assert min(firsts) > 10  # any token may come first
    assert examples(2, 3)[1].shape == (2, 3, 64) and examples(2, 3, 4, "permuted", bag=3)[1].shape == (2, 3, 4)
    assert [bound(h, n, d) for h, n, d in ((20, 32, 64), (20, 64, 32), (1, 1, 5))] == [20 * 31 + 1, 20 * 31 + 1, 1]


def test_what_a_layer_learns_from(monkeypatch):
    """Batches of `batch` examples, cross-entropy of labels or squares of numbers, by the rate and steps asked for."""
    seen = []
    monkeypatch.setattr(mha_memorization_capacity, "fit", lambda *given, **options: seen.append((given, options)) or [1.0])
    queries, contexts = examples(30, 4, 6, "random")
    for labels, classes, batch in ((torch.randint(3, (30,)), 3, 8), (torch.randn(30), None, 99)):
        memorise(queries, contexts, labels, heads=2, key_dim=3, classes=classes, steps=5, batch=batch, lr=0.2, seed=4, weights="sigmoid")
        (model, draw, loss, steps), options = seen[-1]
        assert steps == 5 and options == {"lr": 0.2, "seed": 4} and model.kind == "sigmoid" and model.q.shape == (2, 3, 6)
        rows = draw(torch.Generator().manual_seed(0))
        assert rows.shape == (min(batch, 30),) and int(rows.max()) < 30
        out = model(queries[rows], contexts[rows])
        truth = torch.nn.functional.cross_entropy(out, labels[rows]) if classes else ((out[:, 0] - labels[rows]) ** 2).mean()
        torch.testing.assert_close(loss(rows), truth)
        assert out.shape == (len(rows), classes or 1)
        torch.manual_seed(4)
        assert torch.equal(model.q, MemoryAttention(6, 2, key_dim=3, model_dim=6, outputs=classes or 1).q)
