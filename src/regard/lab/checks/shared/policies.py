"""What a mechanism chooses to read."""

from __future__ import annotations

from torch import Tensor

from regard.algebra import Selection
from regard.catalog import get
from regard.lab.checks.shared.selected import selection_of


def plan_of(name: str, q: Tensor, k: Tensor, **constants: object) -> Selection:
    mechanism = get(name, **constants)
    found = selection_of(mechanism.select, q, k, mechanism.mask)  # type: ignore[attr-defined]
    assert found is not None
    return found
