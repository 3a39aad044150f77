"""Disaggregated core attention: empty documents and ranks, more servers than ranks, bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.core_attention_disaggregation import core_attention_tasks, plan_attention


def test_empty_documents_and_more_servers():
    plan = plan_attention([[0, 40], [], [3]], servers=5, tile=1)
    x = torch.randn(1, 2, 43, 4)
    out = core_attention_tasks(x, x, x, plan)
    truth = torch.cat([torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True) for y in (x[:, :, :40], x[:, :, 40:])], 2)
    assert torch.allclose(out, truth, atol=1e-6) and max(plan.loads()) <= 1.3 * sum(plan.loads()) / 5
    none = plan_attention([[0], []])
    assert core_attention_tasks(x[:, :, :0], x[:, :, :0], x[:, :, :0], none).shape == (1, 2, 0, 4) and none.loads() == [0, 0]


def test_bad_input():
    for documents, options in (([], {}), ([[1]], {"servers": 0}), ([[-1]], {}), ([[1]], {"tol": -1}), ([[1]], {"tile": 0})):
        with pytest.raises(RegardError, match="expected lengths by rank"):
            plan_attention(documents, **options)
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(RegardError, match="expected 6 tokens"):
        core_attention_tasks(x, x, x, plan_attention([[6]]))
