"""Relaxed attention: softmax smoothed towards the uniform distribution (id 71; Lohrenz et al., 2022).

p_i = (1 - gamma) softmax_j(s_ij) + gamma / n_i,   n_i = number of visible keys

Not built: decoding with an external language model (shallow fusion).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.algebra import Hybrid, Mask, Mechanism, RowLocal, Weighted
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine import step
from regard.engine.door import attend
from regard.engine.given import given_mask
from regard.errors import RegardError
from regard.nn.attention import Attention, LayerState
from regard.nn.parts import whole


def even(s: Tensor) -> Tensor:
    return torch.exp(0 * s)


@register("relaxed-attention")
def relaxed_attention(gamma: float = 0.1) -> Hybrid:
    """Two calls, blended: softmax in its own fastest executor, and the mean of the visible values. The input `blend` (2,) = (1 - gamma,
    gamma) replaces gamma, so that it can be drawn anew each step; `regard.nn.RelaxedAttention` relaxes in training only."""
    if not 0 <= gamma <= 1:
        raise RegardError(f"gamma={gamma}: expected a number from 0 to 1")
    return Hybrid((Weighted(), Weighted(normalizer=RowLocal(even, even))), "blend", (1 - gamma, gamma))


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

    @whole
    def step(self, x: Tensor, state: LayerState | None = None, mask: Mask | None = None, **inputs: Any) -> tuple[Tensor, LayerState]:
        if self.relaxing:
            return super().step(x, state, mask, **inputs)
        state = state or LayerState(None, (), 0)
        q, k, v, conv = self.heads_of(x, x, state.position, state.conv)
        o, inner = step(q, k, v, "softmax", state.inner, mask=mask, **inputs)
        return self.close(o, x), LayerState(inner, conv, state.position + x.shape[1])
