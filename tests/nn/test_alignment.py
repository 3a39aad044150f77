"""Every mode of latent alignment gives a finite estimate whose gradient reaches what it trains."""

import pytest
import torch

from regard.nn import LatentAlignment
from regard.zoo.softmax.variational_attention import MODES


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_modes_train(mode, leave_one_out):
    torch.manual_seed(0)
    model = LatentAlignment(8, 5, mode, samples=4, leave_one_out=leave_one_out).double()
    h, memory, y = torch.randn(3, 8).double(), torch.randn(3, 7, 8).double(), torch.tensor([0, 3, 4])
    found = model(h, memory, y)
    found.loss.backward()
    assert found.log_likelihood.shape == (3,) and torch.isfinite(found.log_likelihood).all()
    trained = [model.prior, model.out] + ([] if mode in ("soft", "exact", "hard") else [model.infer])
    for part in trained:
        grads = [p.grad for p in part.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        assert any(g.abs().sum() > 0 for g in grads)
    assert torch.allclose(found.alignment.sum(-1), torch.ones(3).double())


def test_prediction_is_a_distribution():
    model = LatentAlignment(8, 5)
    h, memory = torch.randn(3, 8), torch.randn(3, 7, 8)
    for top in (None, 3):
        assert torch.allclose(model.predict(h, memory, top).exp().sum(-1), torch.ones(3), atol=1e-5)
