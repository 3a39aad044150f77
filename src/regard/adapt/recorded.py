"""The queries, keys and values that a pretrained model makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine.policy import Heads, Recorded


def record(model: nn.Module, ids: Tensor) -> list[Heads]:
    """q, k, v of every layer of a transformers model on ids (B, L)."""
    from .patch import patch

    kept = Recorded()
    with torch.no_grad(), patch(model, kept, when="prefill"):
        model(input_ids=ids, use_cache=False)
    return kept.layers
