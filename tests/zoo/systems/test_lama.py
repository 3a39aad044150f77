"""LAMA: empty rows, bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.lama import LAMAClassifier, LAMAPool


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
