"""Sparsemax: the map along any dimension with its gradient, the loss for one and for several labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.zoo.softmax.sparsemax import sparsemax_loss, sparsemax_weights


def projected(z: list[float]) -> list[float]:
    low, high = max(z) - 1, max(z)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(x - middle, 0.0) for x in z) >= 1 else (low, middle)
    return [max(x - low, 0.0) for x in z]


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_the_map(dim: int) -> None:
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    rows = z.movedim(dim, -1).flatten(0, 1)
    want = torch.tensor([projected(row) for row in rows.tolist()], dtype=torch.float64).view(z.movedim(dim, -1).shape).movedim(-1, dim)
    torch.testing.assert_close(sparsemax_weights(z, dim), want)
    if dim == -1:
        torch.testing.assert_close(sparsemax_weights(z), want)
    assert torch.autograd.gradcheck(lambda z: sparsemax_weights(z, dim), (z.requires_grad_(),))


def test_ties_and_single_entries() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [5.0, 0.0, 0.0]], dtype=torch.float64)
    want = torch.tensor([[0.5, 0.5, 0.0], [1 / 3] * 3, [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(sparsemax_weights(z), want)
    assert float(sparsemax_weights(torch.tensor([-3.0]))) == 1.0


def loss_of(z: list[float], q: list[float]) -> float:
    p = projected(z)
    support = [x for x, w in zip(z, p, strict=True) if w > 0]
    tau = (sum(support) - 1) / len(support)
    return -sum(a * b for a, b in zip(q, z, strict=True)) + sum(x * x - tau * tau for x in support) / 2 + sum(a * a for a in q) / 2


def test_losses() -> None:
    z, labels = 2 * torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    several = torch.rand(6, 5, dtype=torch.float64)
    several = several / several.sum(-1, keepdim=True)
    for target, dense in ((labels, torch.nn.functional.one_hot(labels, 5).double()), (several, several)):
        leaf = z.clone().requires_grad_()
        found = sparsemax_loss(leaf, target)
        torch.testing.assert_close(
            found, torch.tensor([loss_of(a, b) for a, b in zip(z.tolist(), dense.tolist(), strict=True)], dtype=torch.float64)
        )
        (grad,) = torch.autograd.grad(found.sum(), leaf)
        torch.testing.assert_close(grad, torch.tensor([projected(a) for a in z.tolist()], dtype=torch.float64) - dense)
        assert bool((found >= -1e-12).all())
    own: Tensor = sparsemax_weights(z)
    torch.testing.assert_close(sparsemax_loss(z, own), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
