"""Block-Attention: passages are encoded alone, their keys turned to where they stand, and the last block reads all (id 225; Ma et al., 2024).

mask: i sees j <= i where block(i) is the last or block(i) = block(j);   store: k_raw = R(-p) k_p;   assembled: k = R(offset + p) k_raw
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.policies import rope_of
from regard.cache.rows import cache_argument
from regard.catalog.registry import register
from regard.errors import RegardError


def block_attention_mask(lengths: Sequence[int], final: int) -> Tensor:
    """(L, L) bool for blocks of these lengths and a last one of `final` tokens, L their sum; positions are those of the whole text."""
    if final < 1 or any(n < 0 for n in lengths):
        raise RegardError(f"lengths={list(lengths)}, final={final}: expected 0 or more, and a last block of at least 1")
    block = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, final]))
    last = block == len(lengths)
    return (last[:, None] | (block[:, None] == block)) & torch.ones(len(block), len(block), dtype=torch.bool).tril()


def block_logits(model: Any, blocks: Sequence[Tensor], final: Tensor) -> Tensor:
    """Logits (1, L, V) of a whole text under the mask, for fine-tuning on labels of the last block; blocks, final: ids (n,)."""
    mask = block_attention_mask([len(block) for block in blocks], len(final))[None, None].to(final.device)
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise RegardError("block attention needs a mask of all pairs; expected model.set_attn_implementation('sdpa')")
    if model.config._attn_implementation == "eager":
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return model(input_ids=torch.cat([*blocks, final])[None], attention_mask=mask, use_cache=False).logits  # type: ignore[no-any-return]


@dataclass
class Kept:
    """Keys without rotary positions and values of one block, (1, Hkv, n, D) a layer."""

    keys: list[Tensor]
    values: list[Tensor]


@register("block-attention", kind="policy")
class BlockKVStore:
    """Blocks that a transformers decoder with plain rotary positions has read, by their tokens; turned in at least float32.

    forwarded: tokens that the model has read so far. most: blocks kept, the ones used longest ago go first (None: all). dtype: of what is kept
    (None: the model's; the release keeps bfloat16). What is kept belongs to the model's weights: `clear()` after training.
    """

    def __init__(self, model: nn.Module, most: int | None = None, dtype: torch.dtype | None = None):
        host: Any = model
        self.model, self.rope = host, rope_of(host.config.get_text_config(), "block attention")
        if most is not None and most < 1:
            raise RegardError(f"most={most}: expected at least 1")
        self.most, self.dtype, self.forwarded = most, dtype, 0
        self.blocks: dict[str, Kept] = {}

    def clear(self) -> None:
        self.blocks.clear()

    def turned(self, k: Tensor, places: Tensor) -> Tensor:
        wide = torch.promote_types(k.dtype, torch.float32)
        return self.rope.rotate(k.to(wide), places)

    def read(self, ids: Tensor, cache: Any, start: int) -> Any:
        self.forwarded += len(ids)
        places = torch.arange(start, start + len(ids), device=ids.device)[None]
        return self.model(input_ids=ids[None], position_ids=places, use_cache=True, **{cache_argument(self.model): cache})

    @torch.no_grad()
    def block(self, ids: Tensor) -> Kept:
        """A passage's keys and values, read now or before."""
        from transformers import DynamicCache

        name = hashlib.sha256(ids.to(torch.int64).cpu().numpy().tobytes()).hexdigest()
        kept = self.blocks.pop(name, None)
        if kept is None:
            cache: Any = DynamicCache()
            self.read(ids, cache, 0)
            back = -torch.arange(len(ids), device=ids.device)
            dtype = self.dtype or cache.layers[0].keys.dtype
            kept = Kept([self.turned(x.keys, back).to(dtype) for x in cache.layers], [x.values.to(dtype) for x in cache.layers])
        self.blocks[name] = kept  # the newest last
        while self.most is not None and len(self.blocks) > self.most:
            self.blocks.pop(next(iter(self.blocks)))
        return kept

    @torch.no_grad()
    def prefill(self, blocks: Sequence[Tensor], final: Tensor) -> tuple[Tensor, Any]:
        """Passages ids (n,) and the last block ids (m,) -> its logits (1, m, V), and a cache to decode with, at position sum n + m."""
        from transformers import DynamicCache

        if final.dim() != 1 or len(final) < 1 or any(block.dim() != 1 or len(block) < 1 for block in blocks):
            raise RegardError("blocks, final: expected token ids (n,), at least one token each")
        offset = 0
        cache: Any = DynamicCache()
        parts = []
        for ids in blocks:
            parts.append((self.block(ids), torch.arange(offset, offset + len(ids), device=ids.device)))
            offset += len(ids)
        dtype = next(self.model.parameters()).dtype
        for layer in range(self.model.config.get_text_config().num_hidden_layers if parts else 0):
            k = torch.cat([self.turned(one.keys[layer], places).to(dtype) for one, places in parts], 2)
            cache.update(k, torch.cat([one.values[layer].to(dtype) for one, _ in parts], 2), layer)
        return self.read(final, cache, offset).logits, cache
