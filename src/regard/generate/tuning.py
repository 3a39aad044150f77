"""What training of guessing parts needs from a transformers decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def states(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Whole texts ids (B, L) -> (hidden (B, L, D), the states that the output layer reads, and logits (B, L, V))."""
    kept: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits
    finally:
        handle.remove()
    return kept[-1], logits


@torch.no_grad()
def own_texts(model: Any, prompts: Tensor, length: int, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Self-distillation data: prompts (B, n) continued by the model itself, (B, n + length)."""
    from .loop import generate

    options: dict[str, Any] = {"temperature": temperature, "generator": generator}
    return generate(model, prompts, "plain", max_new_tokens=length, ends=(), **options).tokens
