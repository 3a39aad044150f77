"""Combiner: the grid it chooses where none is given."""

from __future__ import annotations

import pytest
import torch

from regard.zoo.linear.combiner import combiner_attention


@pytest.mark.parametrize(("length", "width"), [(36, 6), (35, 5), (30, 5), (24, 4), (13, 1)])
def test_the_widest_grid_up_to_the_root(length: int, width: int) -> None:
    q, k, v = (torch.randn(1, 2, length, 4) for _ in range(3))
    torch.testing.assert_close(combiner_attention(q, k, v, "axial"), combiner_attention(q, k, v, "axial", width))
