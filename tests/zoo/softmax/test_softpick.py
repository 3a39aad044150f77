"""Softpick's divisor stands over e^m, m the row's largest score: its gradient passes through m, in every float64 executor."""

from __future__ import annotations

import pytest
import torch

import regard


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
