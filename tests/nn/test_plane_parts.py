"""Max pooling by rows and columns and dilated convolutions by phases equal PyTorch's own, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.nn.images.planes import Dilated, max_around


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 5), (13, 9)])
def test_max_pooling(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    for pool in (1, 3, 5):
        found, truth = max_around(x, pool), F.max_pool2d(x, pool, 1, pool // 2)
        seed = torch.randn_like(truth)
        assert torch.equal(found, truth)
        assert torch.allclose(torch.autograd.grad(found, x, seed)[0], torch.autograd.grad(truth, x, seed)[0])


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (7, 3), (5, 4)])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (12, 12), (13, 7)])
def test_dilated_convolutions(kernel, dilation, size):
    torch.manual_seed(0)
    layer = Dilated(4, kernel, dilation).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    found, truth = layer(x), nn.Conv2d.forward(layer, x)
    assert found.shape == truth.shape and torch.allclose(found, truth, atol=1e-12)
    seed, leaves = torch.randn_like(truth), (x, layer.weight, layer.bias)
    for a, b in zip(torch.autograd.grad(found, leaves, seed), torch.autograd.grad(truth, leaves, seed), strict=True):
        assert torch.allclose(a, b, atol=1e-11)
    assert layer(x[:0]).shape == (0, 4, *size)
    with torch.device("meta"):
        assert Dilated(4, kernel, dilation)(torch.randn(2, 4, *size)).shape == x.shape
