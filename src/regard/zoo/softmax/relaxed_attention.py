"""Relaxed attention: softmax smoothed towards the uniform distribution (id 71; Lohrenz et al., 2022).

p_i = (1 - gamma) softmax_j(s_ij) + gamma / n_i,   n_i = number of visible keys

Decoding beside an external language model: `shallow_fusion`.
"""

from __future__ import annotations

from collections.abc import Callable
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


IMPOSSIBLE = -1e4  # the log of a probability that is as good as 0
Scores = Callable[[Tensor], Tensor]  # tokens (B, L) -> logits (B, L, V)


@torch.no_grad()
def shallow_fusion(
    decoder: Scores,
    language: Scores,
    start: Tensor,
    count: int,
    *,
    weight: float = 0.3,
    internal: Scores | None = None,
    internal_weight: float = 0.0,
    beams: int = 1,
    end: int | None = None,
) -> Tensor:
    """Beam search by log p_decoder + weight log p_language - internal_weight log p_internal: start (B, n) -> the best (B, n + count) of each row.

    decoder, language, internal: tokens (B, L) -> logits (B, L, V), of which the last row counts; internal: what the decoder knows of the language
    without its source, which relaxed cross-attention weakens. end: a token behind which a beam goes on with itself alone, at no cost. RegardError:
    vocabularies that differ, bad numbers.
    """
    if count < 1 or beams < 1 or weight < 0 or internal_weight < 0 or (internal is None) != (internal_weight == 0):
        raise RegardError(
            f"count={count}, beams={beams}, weight={weight}, internal_weight={internal_weight}: expected positive numbers, and internal=... where it "
            "has a weight"
        )
    rows, n = start.shape
    beam = start[:, None]
    scores = start.new_zeros(rows, 1, dtype=torch.float64)
    for _ in range(count):
        flat = beam.flatten(0, 1)
        parts = [(decoder, 1.0), (language, weight), *([(internal, -internal_weight)] if internal is not None else [])]
        logs = [part(flat)[:, -1].double().log_softmax(-1) for part, _ in parts]
        if len({one.shape for one in logs}) > 1:
            raise RegardError(
                f"decoder and language model give {' and '.join(str(x.shape[-1]) for x in logs)} symbols; expected the same ones"
            )
        # What the decoder or the language model forbids stays forbidden; what the internal one forbids is no reward without end.
        spoken = [share * (one if share > 0 else one.clamp_min(IMPOSSIBLE)) for one, (_, share) in zip(logs, parts, strict=True) if share]
        step = sum(spoken[1:], spoken[0]).view(rows, beam.shape[1], -1)
        if end is not None:
            done = (beam[:, :, n:] == end).any(-1)
            only = torch.full_like(step[0, 0], float("-inf"))
            only[end] = 0.0
            step = torch.where(done[..., None], only, step)
        total = (scores[..., None] + step).flatten(1)
        scores, at = total.topk(min(beams, total.shape[1]), dim=1)
        from_beam, token = at // step.shape[-1], at % step.shape[-1]
        beam = torch.cat((beam.gather(1, from_beam[..., None].expand(-1, -1, beam.shape[-1])), token[..., None]), -1)
    return beam[:, 0]
