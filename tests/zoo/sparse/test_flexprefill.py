"""FlexPrefill's budgets: the least and the most blocks of columns and of diagonals that a query block reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regard
from regard import Causal


def read(**options: Any) -> torch.Tensor:
    """(H, L, L) bool: pairs read, by heads that are never query-aware."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 64, 8, dtype=torch.float64) for heads in (4, 2))
    v = torch.eye(64, dtype=torch.float64).expand(1, 2, -1, -1)
    mechanism = regard.get("flexprefill", tau=0.0, block_size=8, count_size=8, **options)
    return regard.attend(q, k, v, mechanism, mask=Causal())[0] > 0


@pytest.mark.parametrize(
    "options", [{"gamma": 0.01, "min_budget": None}, {"gamma": 0.01, "min_budget": 8}, {"gamma": 0.9, "min_budget": None, "max_budget": 8}]
)
def test_one_block_is_the_first_column_and_the_diagonal(options: dict[str, Any]) -> None:
    u, w = torch.arange(64)[:, None] // 8, torch.arange(64) // 8
    seen = ((w == 0) | (w == u)) & torch.ones(64, 64, dtype=torch.bool).tril()
    assert all(torch.equal(head, seen) for head in read(**options))


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"gamma": 0.01, "min_budget": 9}, 2),
        ({"gamma": 0.01, "min_budget": 24}, 3),
        ({"gamma": 0.99, "min_budget": None, "max_budget": 20}, 3),
    ],
)
def test_budgets_are_whole_blocks(options: dict[str, Any], blocks: int) -> None:
    """Of the last query block, so many columns and so many diagonals, the first ones of both always among them."""
    for head in read(**options):
        row = head[63].view(8, 8).all(-1)
        assert row[0] and row[7] and max(2, blocks) <= int(row.sum()) <= 2 * blocks
    wide = read(gamma=0.99, min_budget=None, max_budget=None)
    assert int(wide.sum()) > int(read(**options).sum())
