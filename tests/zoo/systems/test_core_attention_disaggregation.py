"""Disaggregated core attention: empty documents and ranks, more servers than ranks, bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.core_attention_disaggregation import (
    AttentionPlan,
    Task,
    core_attention_tasks,
    head_parallel_bytes,
    plan_attention,
    split_work,
)


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


def test_scale_reaches_every_task():
    plan, x = plan_attention([[11], [3]], tile=2), torch.randn(1, 2, 14, 4)
    assert len(plan.tasks) > 2
    assert torch.allclose(core_attention_tasks(x, x, x, plan, scale=0.1), core_attention_tasks(0.2 * x, x, x, plan), atol=1e-6)


def test_cuts_are_the_fewest_whole_tiles_that_make_the_work():
    task = Task(0, 0, 10, 0, 0)
    assert task.work == 55 and [split_work(task, work, 2)[0].rows for work in (1, 19, 20, 34, 35, 45, 54)] == [2, 2, 4, 4, 6, 6, 8]
    tail, rest = split_work(task, 20, 2)
    assert (tail.start, tail.stop, rest.start, rest.stop) == (6, 10, 0, 6) and tail.work + rest.work == 55
    assert split_work(Task(0, 4, 6, 0, 0), 1, 2) is None and split_work(Task(0, 4, 6, 0, 0), 1, 1)[0].rows == 1


def test_bytes_and_seconds_by_hand():
    plan = AttentionPlan((10,), 2, (Task(0, 0, 6, 0, 0), Task(0, 6, 10, 0, 1)), 3, 5)
    assert plan.loads() == [21, 34] and plan.moved() == 4 * 2 * 3 + 10 * 5 == 74
    assert plan.seconds(34.0, 37.0) == 2.0 and plan.seconds(17.0, 74.0) == 2.0 and plan.seconds(3.4, 37.0) == 10.0
    assert head_parallel_bytes([[10], [6], [5]], 3, 5) == 21 * 11 * 2 // 3
