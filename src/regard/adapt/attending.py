"""A transformers model whose layers attend by a function of one's own, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError


def padding_alone(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask as it came, (B, tokens): the function itself knows what is seen."""
    return attention_mask


def one_text_a_row(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The same, but documents packed in a row, which transformers tells by position_ids that begin anew, are refused."""
    rows, length, sees = options.get("batch_size", 1), int(options.get("q_length", 1)), options.get("mask_function")
    if sees is not None and length > 1 and int(options.get("q_offset", 0)) == 0:
        at, device = torch.arange(1, length, device=options.get("device")), options.get("device")
        seen = torch.as_tensor(sees(torch.arange(rows, device=device)[:, None], 0, at, at - 1))
        if not bool(seen.all()):
            raise RegardError("position_ids begin anew within a row, as of packed documents; expected one text a row")
    return attention_mask


@contextmanager
def attending(model: nn.Module, name: str, function: Callable[..., tuple[Tensor, Any]], any_positions: bool = False) -> Iterator[None]:
    """function(module, q (B, H, n, D), k, v (B, Hkv, m, D), mask (B, tokens) or None, **options) -> (out (B, n, H, D), weights or None).

    name: what transformers calls it. any_positions: position_ids may begin anew within a row, for the function knows why; else packed documents are
    refused. A model that attends by a mechanism of regard's already is refused.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    model = getattr(model, "get_base_model", lambda: model)()  # of peft
    if not isinstance(model, PreTrainedModel):
        raise RegardError(f"model {type(model).__name__}: expected a model of transformers")
    own = str(model.config._attn_implementation)
    if own.startswith("regard"):
        raise RegardError(f"the model attends by {own} already; expected its own attention: model.set_attn_implementation('sdpa')")
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, padding_alone if any_positions else one_text_a_row)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


__all__ = ["attending"]
