"""SinkLoRA: grouped attention of long fine-tuning texts, half of the heads shifted without a leak, and sinks for all (id 144; Zhang, 2024).

head h, o_h in {0, G/2}: i sees j <= i with j < n_sink or floor((i - o_h) / G) = floor((j - o_h) / G);   out = softmax(q k^T / sqrt(d)) v
restore < 1 leaves the last shifted heads as LongLoRA has them: their last group joins [L - G/2, L) and [0, G/2), in that order
At inference full attention, or `regard.cache.H2O`. Not reproduced: a lower loss than after training with LongLoRA's groups (recall in a layer of
4 heads from 24 to 96 tokens: the same loss to 0.01).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from regard.adapt.attending import attending
from regard.algebra import Causal, Explicit, FixedBlock, Mask, PerHead, Sinks, Where, bind
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import MissingDependency, RegardError


def rolled(b: Tensor, h: Tensor, i: Tensor, j: Tensor, group: int, length: int) -> Tensor:
    """Groups of the text turned by half a group, causal in turned order: its first tokens see its last ones."""
    i, j = (i - group // 2) % length, (j - group // 2) % length
    return (i // group == j // group) & (j <= i)


def sf_mask(heads: int, length: int, group: int | None = None, n_sink: int = 4, shift_heads: float = 0.5, restore: float = 1.0) -> Mask:
    """What each of `heads` heads shows. group: None is length // 4. The last heads are shifted, the first of those restored."""
    group = length // 4 if group is None else group
    if group < 1 or n_sink < 0 or not 0 <= shift_heads <= 1 or not 0 <= restore <= 1:
        raise RegardError(
            f"group={group}, n_sink={n_sink}, shift_heads={shift_heads}, restore={restore} for {length} tokens: expected a group of at least 1 "
            "(None: length // 4, of at least 4 tokens), 0 or more sinks, and shares from 0 to 1"
        )
    plain = int(heads * (1 - shift_heads))
    whole = round((heads - plain) * restore)
    leaky = heads - plain - whole
    if plain < heads and group % 2:
        raise RegardError(f"group={group}: expected an even one, for heads are shifted by half of it")
    if leaky and length % group:
        raise RegardError(f"restore={restore} joins the text's ends: expected a length that group={group} divides, not {length}")
    sinks = Causal() & Sinks(n_sink) if n_sink else None
    parts: list[Mask] = [Causal() & FixedBlock(group)] * plain + [Causal() & FixedBlock(group, group // 2)] * whole
    parts += [Where(bind(rolled, group=group, length=length))] * leaky
    masks = tuple(part if sinks is None else part | sinks for part in parts)
    return masks[0] if len(set(masks)) == 1 else PerHead(masks)


@register("sinklora", kind="function")
def sf_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int | None = None,
    n_sink: int = 4,
    shift_heads: float = 0.5,
    restore: float = 1.0,
    *,
    visible: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """q (B, H, L, D), k, v (B, Hkv, L, D) -> (B, H, L, D) in O(L (group + n_sink)) pairs.

    group: tokens of a group (None: L // 4). n_sink: first tokens that all see. shift_heads: the share of heads shifted by half a group.
    restore: the share of these whose cut groups are put back in their places; 0 with n_sink=0 is LongLoRA's S2-Attn, which reads later tokens.
    visible: bool, broadcastable to (B, H, L, L), of which keys a query sees beside that (padding, documents).
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[2] != k.shape[2]:
        raise RegardError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: expected (B, H, L, D) of one length, the whole text; decoding runs full attention"
        )
    own = sf_mask(q.shape[1], q.shape[2], group, n_sink, shift_heads, restore)
    if visible is None:
        return attend(q, k, v, mask=own, scale=scale)
    return attend(q, k, v, mask=own & Explicit(), visible=visible, scale=scale)


@contextmanager
def sf_training(
    model: nn.Module, group: float = 0.25, n_sink: int = 4, shift_heads: float = 0.5, restore: float = 1.0
) -> Iterator[nn.Module]:
    """A transformers decoder that attends so inside the block, for training on whole texts; behind it, full attention as before.

    group: the share of a batch's length. Texts may be padded on the right.
    """
    if not 0 < group <= 1:
        raise RegardError(f"group={group}: expected a share of the length, above 0 and at most 1")

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, **options: Any) -> tuple[Tensor, None]:
        if padding is not None:
            there = padding.bool()
            if bool((there[:, 1:] & ~there[:, :-1]).any()):
                raise RegardError("attention_mask: expected padding on the right, for the first tokens are the sinks")
        if options.get("dropout"):
            raise RegardError(f"dropout={options['dropout']} of attention weights: expected 0")
        size = int(q.shape[2] * group)
        visible = None if padding is None or bool(padding.all()) else padding.bool()[:, None, None]
        o = sf_attention(q, k, v, size, n_sink, shift_heads, restore, visible=visible, scale=options.get("scaling"))
        return o.transpose(1, 2), None

    with attending(model, "regard_sinklora", attention):
        yield model


def longer(
    model: nn.Module,
    length: int,
    rank: int = 8,
    alpha: int = 16,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    also: Sequence[str] = ("embed", "norm"),
) -> Any:
    """A transformers decoder made ready to learn texts of `length` tokens: positions divided by ceil(length / trained length), LoRA of `rank` by
    peft on `targets`, and every parameter whose name holds one of `also` trainable. Changes the model's rotary table; gives peft's model."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as missing:
        raise MissingDependency("longer needs peft: pip install 'regard[lora]'") from missing

    host: Any = model
    config = host.config.get_text_config()
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "default":
        raise RegardError(f"rope_parameters={rope}: expected a decoder with plain rotary positions")
    trained = config.max_position_embeddings
    if length > trained:
        config.rope_parameters = {**rope, "rope_type": "linear", "factor": float(math.ceil(length / trained))}
        config.max_position_embeddings = length
        body = host.get_decoder()
        body.rotary_emb = type(body.rotary_emb)(config).to(next(model.parameters()).device)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    tuned = get_peft_model(host, lora)
    for name, p in tuned.named_parameters():
        if any(part in name for part in also):
            p.requires_grad_()
    return tuned


__all__ = ["longer", "sf_attention", "sf_mask", "sf_training"]
