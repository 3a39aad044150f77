"""The small ViT that comes with regard, and digits on photographs that it was not trained on."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import models
from regard.tasks.digits import Drawn, digits


def shipped() -> Any:
    return models.load("digits-vit")


@functools.cache
def unseen(count: int = 400) -> Drawn:
    return digits(count, torch.Generator().manual_seed(3), held_out=True)


def inked(drawn: Drawn, share: float = 0.1) -> Tensor:
    """(B, 64) bool: patches of 4 x 4 pixels that the digit covers by more than `share`."""
    return F.avg_pool2d(drawn.ink[:, None], 4).flatten(1) > share


@torch.no_grad()
def accuracy(model: nn.Module, drawn: Drawn) -> float:
    return float((model(drawn.images).argmax(1) == drawn.labels).double().mean())
