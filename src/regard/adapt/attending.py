"""A transformers model whose layers attend by a function of one's own, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import RegardError


def padding_alone(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask as it came, (B, tokens): the function itself knows what is seen."""
    return attention_mask


@contextmanager
def attending(model: nn.Module, name: str, function: Callable[..., tuple[Tensor, Any]]) -> Iterator[None]:
    """function(module, q (B, H, n, D), k, v (B, Hkv, m, D), mask (B, tokens) or None, **options) -> (out (B, n, H, D), weights or None).

    name: what transformers calls it. A model that attends by a mechanism of regard's already is refused.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    model = getattr(model, "get_base_model", lambda: model)()  # of peft
    if not isinstance(model, PreTrainedModel):
        raise RegardError(f"model {type(model).__name__}: expected a model of transformers")
    own = str(model.config._attn_implementation)
    if own.startswith("regard"):
        raise RegardError(f"the model attends by {own} already; expected its own attention: model.set_attn_implementation('sdpa')")
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, padding_alone)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


__all__ = ["attending", "padding_alone"]
