"""Softpick's map along any dimension; its divisor stands over e^m, m the row's largest score, and its gradient passes through m, in every float64 executor."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.zoo.softmax.softpick import softpick_weights


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_the_map_along_any_dimension(dim: int, eps: float) -> None:
    x = 2 * torch.randn(3, 4, 5, dtype=torch.float64)
    x[1, 2, 3] = -math.inf
    x[0] -= 9  # entries below zero alone
    given = ({} if dim == -1 else {"dim": dim}) | ({} if eps == 1e-8 else {"eps": eps})
    found = softpick_weights(x, **given).movedim(dim, -1)  # type: ignore[arg-type]
    for row, got in zip(x.movedim(dim, -1).flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        seen = [y for y in row if y > -math.inf]
        total = sum(abs(math.exp(y) - 1) for y in seen) + eps * math.exp(max(0.0, *seen))
        assert got == pytest.approx([max(math.exp(y) - 1, 0.0) / total for y in row])


def test_the_map_is_finite_for_huge_and_for_hidden_entries() -> None:
    x = torch.tensor(
        [[900.0, 899.0, -900.0], [-math.inf, -math.inf, -math.inf], [-900.0, -1.0, -math.inf], [0.0, 0.0, 0.0]], requires_grad=True
    )
    y = softpick_weights(x, eps=0.0)
    e = math.exp(-1)
    torch.testing.assert_close(y, torch.tensor([[1 / (1 + e), e / (1 + e), 0.0], [0.0] * 3, [0.0] * 3, [0.0] * 3]))
    assert bool(torch.autograd.grad(y.square().sum(), x)[0].isfinite().all())


@pytest.mark.parametrize("executor", ["tiled", "reference"])
@pytest.mark.parametrize("mask", [None, regard.Causal()])
def test_gradients_with_a_large_eps(executor: str, mask: regard.Mask | None) -> None:
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mechanism = regard.get("softpick", eps=0.1)
    assert torch.autograd.gradcheck(lambda q, k, v: regard.attend(q, k, v, mechanism, mask=mask, executor=executor), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda q, k, v: regard.attend(q, k, v, mechanism, mask=mask, executor=executor), (q, k, v))
    s = q @ k.mT / 2
    seen = torch.ones(6, 6, dtype=torch.bool) if mask is None else torch.ones(6, 6, dtype=torch.bool).tril()
    rise = torch.where(seen, torch.exp(s) - 1, 0.0)
    top = s.masked_fill(~seen, float("-inf")).amax(-1, keepdim=True).clamp_min(0)
    want = rise.relu() / (rise.abs().sum(-1, keepdim=True) + 0.1 * torch.exp(top)) @ v
    torch.testing.assert_close(regard.attend(q, k, v, mechanism, mask=mask, executor=executor), want)
