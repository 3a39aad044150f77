"""Shared fixtures: fixed seeds, as many threads as there are cores for each worker, and sample calls of every registered mechanism."""

from __future__ import annotations

import os

import pytest
import torch

from regard.nn.timm_host import operators

ROOM = operators()  # before transformers looks for torchvision, whose binary may be one for CUDA
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
