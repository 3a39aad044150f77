"""Lightning attention in parts that run side by side, for whole batches."""

from __future__ import annotations

import pytest
import torch

from regard.zoo.linear.lightning_attention_2 import lightning_in_parts


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_equal_the_sum(parts: int) -> None:
    q, k, v = (torch.randn(3, 2, 7, d, dtype=torch.float64) for d in (4, 4, 5))
    rate = torch.tensor([-0.1, -0.7], dtype=torch.float64)
    out = lightning_in_parts(q, k, v, rate, parts)
    for t in range(7):
        want = sum(torch.exp(rate * (t - j))[:, None] * (q[:, :, t] * k[:, :, j]).sum(-1, keepdim=True) * v[:, :, j] for j in range(t + 1))
        torch.testing.assert_close(out[:, :, t], want)
