"""A transformers decoder that reads trees: the prompt once, then all nodes of a draft in one masked pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.rows import cache_argument, keep_rows
from ..errors import MissingDependency, RegardError
from ..nn.images.timm_host import operators
from .tree import Draft

MASKED = ("sdpa", "eager")  # implementations of attention that read a mask of all pairs
KEEPING = frozenset({"full_attention", "sliding_attention"})  # layers that keep a key and a value a token


@dataclass
class Seen:
    """What a pass gave: logits (B, n, V), and hidden (B, n, D), the states that the output layer read."""

    logits: Tensor
    hidden: Tensor


class Host:
    """A causal language model with its cache of the tokens read so far. length (B,): how many; valid, places (B, L): which entries of
    the cache are a row's own, and their positions."""

    def __init__(self, model: nn.Module):
        operators()
        try:
            from transformers import DynamicCache, PreTrainedModel
        except ImportError as missing:
            raise MissingDependency("regard.generate needs transformers: pip install 'regard[hf]'") from missing
        if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            raise RegardError(f"model {type(model).__name__}: expected a causal language model of transformers")
        if model.training:
            raise RegardError("the model is in training mode, where dropout makes drafts pointless; expected model.eval()")
        self.model, self.config = model, model.config.get_text_config()
        kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        if kinds - KEEPING:
            raise RegardError(f"layers of kind {', '.join(sorted(kinds - KEEPING))} keep states, not tokens; trees need keys and values")
        implementation = self.config._attn_implementation
        if implementation not in MASKED and not implementation.startswith("regard"):
            raise RegardError(f"attention {implementation!r} reads no mask of a tree; expected model.set_attn_implementation('sdpa')")
        window = getattr(self.config, "sliding_window", None)
        slides = "sliding_attention" in kinds or (getattr(self.config, "layer_types", None) is None and window)
        self.window: int | None = window if slides and getattr(self.config, "use_sliding_window", True) is not False else None
        self.kinds = kinds
        self.cache: Any = DynamicCache()
        self.takes = frozenset(inspect.signature(self.model.forward).parameters)
        self.additive = implementation == "eager"

    def read(self, ids: Tensor, valid: Tensor) -> Seen | None:
        """The prompt but its last token: ids, valid (B, L) bool. None where it is empty; logits and states are of its last token alone."""
        self.length, self.valid = valid.sum(-1), valid
        self.places = (valid.cumsum(-1) - 1).clamp_min(0)
        if ids.shape[1] == 0:
            return None
        n = ids.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril() & valid[:, None]
        mask |= torch.eye(n, dtype=torch.bool, device=ids.device)  # padding sees itself, for no row may be empty
        options = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        seen = self.run(ids, self.places, mask, self.places, **options)
        return Seen(seen.logits[:, -1:], seen.hidden[:, -1:])

    def verify(self, draft: Draft) -> Seen:
        """All nodes of a draft at their positions, each with what came before and its ancestors in sight."""
        places = self.length[:, None] + draft.depths
        own = draft.ancestors.expand(len(self.length), -1, -1)
        mask = torch.cat((self.valid[:, None].expand(-1, own.shape[1], -1), own), -1)
        return self.run(draft.tokens, places, mask, torch.cat((self.places, places), 1))

    def run(self, ids: Tensor, places: Tensor, mask: Tensor, keys: Tensor, **options: Any) -> Seen:
        kept: list[Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: kept.append(args[0]))  # type: ignore[operator]
        try:
            out = self.model(
                input_ids=ids,
                attention_mask=self.masks(mask, places, keys),
                position_ids=places,
                use_cache=True,
                **{cache_argument(self.model): self.cache, **options},
            )
        finally:
            handle.remove()
        if not self.cache.layers or not self.cache.layers[0].is_initialized:
            raise RegardError(f"{type(self.model).__name__} kept no keys in its cache; expected a decoder that uses past_key_values")
        return Seen(out.logits, kept[-1])

    def masks(self, mask: Tensor, places: Tensor, keys: Tensor) -> Any:
        """The mask (B, n, L) as the model takes it: for layers with a window, what lies in it."""
        if self.window is None or int(places.max()) < self.window:
            return self.dressed(mask)
        near = mask & (places[:, :, None] - keys[:, None] < self.window)
        if self.kinds <= {"sliding_attention"} or len(self.kinds) == 1:
            return self.dressed(near)
        return {"full_attention": self.dressed(mask), "sliding_attention": self.dressed(near)}

    def dressed(self, mask: Tensor) -> Tensor:
        if not self.additive:
            return mask[:, None]
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[:, None]

    def keep(self, path: Tensor, count: Tensor) -> None:
        """Of the nodes just verified keep those of path (B, m), of which the first count (B,) are a row's own."""
        start, held = self.valid.shape[1], torch.arange(path.shape[1], device=path.device) < count[:, None]
        keep_rows(self.cache, start, path)
        self.places = torch.cat((self.places, self.length[:, None] + torch.arange(path.shape[1], device=path.device)), 1)
        self.valid = torch.cat((self.valid, held), 1)
        self.length = self.length + count
