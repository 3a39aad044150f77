"""Sinkhorn's iterations in loops, padding, and the flow of particles they drive."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.zoo.softmax.sinkformer import attention_flow


def balanced(c: Tensor, iterations: int) -> Tensor:
    """n exp(C + f + g): rows and columns in turn, starting with rows, to sums 1 / n and 1 / m."""
    k = torch.exp(c - c.max())
    for step in range(iterations):
        k = k / k.sum(1, keepdim=True) / c.shape[0] if step % 2 == 0 else k / k.sum(0, keepdim=True) / c.shape[1]
    return c.shape[0] * k


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("detach", [False, True])
def test_iterations(iterations: int, detach: bool) -> None:
    q, k, v = torch.randn(1, 2, 6, 4, dtype=torch.float64), *(torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(2))
    want = torch.stack([balanced(q[0, h] @ k[0, h].T / 2, iterations) @ v[0, h] for h in range(2)])
    found = regard.attend(q, k, v, regard.get("sinkformer", iterations=iterations, detach_columns=detach))
    torch.testing.assert_close(found[0], want)


def test_defaults() -> None:
    assert regard.get("sinkformer") == regard.get("sinkformer", iterations=3, detach_columns=False)
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grads = [torch.autograd.grad(regard.attend(q, k, v, regard.get("sinkformer", **o)).sum(), k)[0] for o in ({}, {"detach_columns": True})]
    leaf = k.detach().requires_grad_()
    (want,) = torch.autograd.grad((balanced(q.detach()[0, 0] @ leaf[0, 0].T / 2, 3) @ v.detach()[0, 0]).sum(), leaf)
    torch.testing.assert_close(grads[0], want)
    assert float((grads[1] - want).abs().max()) > 1e-4


@pytest.mark.parametrize("iterations", [3, 21])
def test_the_flow(iterations: int) -> None:
    x, root = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    m = root @ root.T / 6
    found = attention_flow(x, m, iterations=iterations, steps=4, step_size=0.07)
    at, path, energies = x, [x], []
    for step in range(5):
        c = at @ m @ at.T
        a = balanced(c, iterations)
        energies.append(float((a * c).sum() - (a * a.log()).sum()))
        if step < 4:
            at = at - 0.07 * a @ at @ m
            path.append(at)
    torch.testing.assert_close(found.points, torch.stack(path))
    assert found.energy == pytest.approx(energies)

    def field(flat: Tensor) -> Tensor:
        y = flat.view(6, 3)
        return -(balanced(y @ m @ y.T, iterations) @ y @ m).flatten()

    j = torch.autograd.functional.jacobian(field, x.flatten())
    assert found.asymmetry == pytest.approx(float((j - j.T).norm() / j.norm()), abs=1e-9)


def test_defaults_of_the_flow() -> None:
    x, m = torch.randn(4, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    found, same = attention_flow(x, m), attention_flow(x, m, iterations=101, steps=20, step_size=0.1)
    assert torch.equal(found.points, same.points) and found.points.shape == (21, 4, 2) and len(found.energy) == 21


def test_says_what_is_wrong() -> None:
    eye = torch.eye(2)
    for x, m in ((torch.ones(4), eye), (torch.ones(4, 3), eye), (torch.ones(4, 2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))):
        with pytest.raises(regard.RegardError, match="symmetric m"):
            attention_flow(x, m)
    assert math.isfinite(attention_flow(torch.ones(4, 2), eye, steps=1).energy[0])
