"""A prompt that is read once and remembered by many policies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .policies import Full
from .session import Prompt
from .view import View


class Reader(Full):
    """Keeps everything, and the calls themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[View] = []

    def compute(self, view: View, places: Tensor) -> Tensor:
        self.calls.append(view)
        return super().compute(view, places)


@torch.no_grad()
def read_prompt(model: Any, ids: Tensor, attention_mask: Tensor | None = None) -> Prompt:
    """ids (B, n), attention_mask with padding on the left; for `session.recall(prompt)`, which gives the cache that any policy would have left.

    Holds queries, keys and values of all layers.
    """
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    policy = Reader()
    with policy(model):
        out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), logits_to_keep=1)
    return Prompt(policy.calls, mask.bool(), out.logits[:, -1])
