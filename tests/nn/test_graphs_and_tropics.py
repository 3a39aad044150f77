"""Layers of the weighted family that are modules of their own: whole models train, generators are what they say."""

import pytest
import torch

import regard
from regard.tasks.algorithmic import SPLITS, TASKS, shortest_paths
from regard.zoo.softmax.dat import relational_games
from regard.zoo.softmax.graph_transformer import block_model
from regard.zoo.softmax.mta import find_block
from regard.zoo.softmax.tropical_attention import TropicalBlock


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_algorithmic_tasks(task, split):
    x, y = TASKS[task](split, count=5, length=4)
    assert x.shape[:2] == (5, 8 if split == "length" else 4) and torch.isfinite(y).all()
    again, _ = TASKS[task](split, count=5, length=4)
    assert torch.equal(x, again)


def test_knapsack_and_subset_sum_by_brute_force():
    for task in ("knapsack", "subset_sum"):
        x, y = TASKS[task]("train", count=4, length=4)
        for items, answer in zip(x, y, strict=True):
            chosen = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
            total = chosen @ items[:, 0]
            if task == "knapsack":
                best = (chosen @ items[:, 1])[total <= items[0, 2]].max()
            else:
                best = (total == items[0, 1]).any().double()
            assert float(best) == float(answer)


def test_shortest_paths_obey_the_triangle_inequality():
    d = shortest_paths(torch.rand(3, 6, 6, dtype=torch.float64))
    through = d[:, :, :, None] + d[:, None]  # i -> m -> j
    assert (through.amin(2) >= d - 1e-12).all()
    assert (d.diagonal(dim1=1, dim2=2) == 0).all()


def test_tropical_blocks_train():
    block = TropicalBlock(16, 2, 32, tropical_norm=True)
    x = torch.randn(2, 7, 16)
    block(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in block.parameters())


def test_games_and_toys():
    x, y = relational_games("occurs", 64)
    assert x.shape == (64, 5, 8) and set(y.tolist()) == {0, 1}
    tokens, answer = find_block(8)
    assert tokens.shape == (8, 6 * 6 + 2) and answer.max() < 6
    features, edges, label = block_model(30)
    assert features.shape == (30, 3) and edges.shape[0] == 2 and label.shape == (30,)


def test_modules_say_what_is_wrong():
    for make, words in (
        (lambda: regard.nn.FrugalAttention(16, 3), "multiple of heads"),
        (lambda: regard.nn.FrugalAttention(16, 2, "super"), "pass length"),
        (lambda: regard.nn.MultiTokenAttention(16, 4, keys=4), "odd"),
        (lambda: regard.nn.maxplus_matmul(torch.ones(2, 3), torch.ones(2, 3)), r"\(\.\.\., D, E\)"),
        (lambda: regard.nn.GraphTransformerLayer(16, 2)(torch.ones(3, 16), torch.zeros(2, 1).long(), torch.ones(1, 16)), "edge_stream"),
    ):
        with pytest.raises(regard.RegardError, match=words):
            make()
