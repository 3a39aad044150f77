"""Relaxed attention as a regulariser: smoothed weights in training, plain ones after (Lohrenz et al., 2022; id 71)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra import Mask, Mechanism
from ..catalog import get
from ..engine import attend, step
from ..engine.door import given_mask
from ..errors import RegardError
from .attention import Attention, LayerState


class RelaxedAttention(Attention):
    """Softmax attention relaxed by gamma. when: "train" (plain softmax in eval mode) or "matched" (in both). fuzzy_std: gamma is drawn from
    N(gamma, fuzzy_std^2) at every training step, clamped to [0, 1]."""

    def __init__(self, dim: int, heads: int, gamma: float = 0.1, when: str = "train", fuzzy_std: float = 0.0, **options: Any):
        if when not in ("train", "matched"):
            raise RegardError(f"when={when!r}; expected train or matched")
        super().__init__(dim, heads, get("relaxed-attention", gamma=gamma), **options)
        self.gamma, self.when, self.fuzzy_std = gamma, when, fuzzy_std

    @property
    def relaxing(self) -> bool:
        return self.training or self.when == "matched"

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Any = None, **inputs: Any) -> Tensor:
        if not self.relaxing:
            q, k, v, _ = self.heads_of(x, x if context is None else context, 0, None)
            softmax: str | Mechanism = "softmax"
            if isinstance(mask, Tensor):
                softmax, mask, inputs = given_mask(softmax, mask, inputs)
            return self.close(attend(q, k, v, softmax, mask=self.full_mask(mask), **inputs), x)
        gamma = self.gamma
        if self.training and self.fuzzy_std:
            gamma = min(1.0, max(0.0, gamma + self.fuzzy_std * float(torch.randn(()))))
        return super().forward(x, context, mask, blend=torch.tensor((1 - gamma, gamma), device=x.device), **inputs)

    def step(self, x: Tensor, state: LayerState | None = None, mask: Mask | None = None, **inputs: Any) -> tuple[Tensor, LayerState]:
        if self.relaxing:
            return super().step(x, state, mask, **inputs)
        state = state or LayerState(None, (), 0)
        q, k, v, conv = self.heads_of(x, x, state.position, state.conv)
        o, inner = step(q, k, v, "softmax", state.inner, mask=mask, **inputs)
        return self.close(o, x), LayerState(inner, conv, state.position + x.shape[1])
