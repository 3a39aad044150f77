"""What a selecting mechanism chooses to read."""

from typing import Any

from torch import Tensor

from regard.algebra import Full, Weighted
from regard.engine.problem import pose


def chosen(mechanism: Weighted, q: Tensor, k: Tensor, **inputs: Any) -> Tensor:
    """(B, H, query blocks, key blocks) bool."""
    selection = pose(mechanism, Full(), q, k, k, None, inputs).selection
    assert selection is not None
    return selection.keep
