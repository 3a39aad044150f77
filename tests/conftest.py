"""Shared fixtures: fixed seeds, two threads, and sample calls of every registered mechanism."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
