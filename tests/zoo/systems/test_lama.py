"""LAMA: empty rows, bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.lama import LAMAClassifier, LAMAPool, diversity


@pytest.mark.parametrize("context", ["learned", "mean"])
def test_a_row_without_tokens_is_zero(context):
    layer, x = LAMAPool(6, 2, context), torch.full((2, 3, 6), float("nan"))
    x[0] = 1
    keep = torch.tensor([[True, True, False], [False] * 3])
    document, weights = layer(x, keep)
    assert (document[1] == 0).all() and (weights[1] == 0).all() and document.isfinite().all()
    document.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_bad_input():
    for bad in ({"context": "max"}, {"heads": 0}):
        with pytest.raises(RegardError, match="expected 'learned' or 'mean', and at least one head"):
            LAMAPool(**{"dim": 6, "heads": 2, **bad})
    model, ids = LAMAClassifier(9, 2, 4, 3, 2), torch.randint(9, (2, 4))
    for keep in (torch.tensor([[True, False, True, False]] * 2), torch.tensor([[False, True, True, True]] * 2)):
        with pytest.raises(RegardError, match="padding on the right alone"):
            model(ids, keep)
    with pytest.raises(RegardError, match="expected"):
        LAMAPool(6, 2)(torch.randn(2, 3, 5))


def test_sizes_and_what_the_classifier_says():
    model = LAMAClassifier(9, 3, embedding=5, units=4, heads=2, context="mean").double().eval()
    assert (model.embed.embedding_dim, model.gru.hidden_size, model.head.in_features, model.head.out_features) == (5, 4, 16, 3)
    ids, keep = torch.randint(9, (2, 6)), torch.arange(6) < torch.tensor([[6], [4]])
    for row, n in ((0, 6), (1, 4)):
        states = model.gru(model.embed(ids[row : row + 1, :n]))[0][0]
        a = torch.tanh((states @ model.pool.p) * (states.mean(0) @ model.pool.q)).softmax(0)
        truth = (a.T @ states).flatten() @ model.head.weight.T + model.head.bias
        assert torch.allclose(model(ids, keep)[row], truth)
    assert torch.allclose(model(ids)[:1], model(ids, keep)[:1])
    assert LAMAPool(6, 2, tanh=False).tanh is False and LAMAClassifier(9, 2).pool.context is not None


def test_scores_scaled_over_the_heads_and_how_far_heads_are_apart():
    pool, x = LAMAPool(6, 3, normalise=True, tanh=False).double(), torch.randn(2, 4, 6, dtype=torch.float64)
    s = (x @ pool.p) * (pool.context @ pool.q)
    truth = (s / s.norm(dim=-1, keepdim=True)).softmax(1)
    assert torch.allclose(pool(x)[1], truth.transpose(1, 2))
    same = torch.eye(4)[None, [0, 0, 1]]  # two heads alike
    assert float(diversity(same)) == 2 and float(diversity(torch.eye(4)[None, :3])) == 0
    assert float(diversity(torch.cat((same, torch.eye(4)[None, :3])))) == 1
