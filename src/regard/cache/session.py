"""A policy on a model: attention reads the layers that remember, and the policy sees every call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.attending import attending
from ..adapt.host import routed
from ..errors import RegardError
from .layer import KeptLayer
from .rows import cache_argument
from .view import View, Watcher

NAME = "regard_kept"
CHANGES = ("softcap", "s_aux", "sinks", "position_bias", "indices")
_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Prompt:
    """A prompt as a model's layers read it: their calls in order, there (B, n) bool: tokens that are no padding, logits (B, V) of the last token."""

    calls: list[View]
    there: Tensor
    logits: Tensor


def fresh_cache(layers: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.layers = [KeptLayer() for _ in range(layers)]
    return cache


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    return _sessions[module].attend(module, query, attention_mask, options), None


class Session:
    """`with policy(model) as session`: caches filled inside follow the policy; `session.cache` is the newest. The model is as it was behind it."""

    def __init__(self, model: nn.Module, policy: Watcher):
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
            raise RegardError(f"model {type(model).__name__}: expected a decoder of transformers")
        config = model.config.get_text_config()
        if not hasattr(config, "num_key_value_heads") or set(getattr(config, "layer_types", None) or ()) - {
            "full_attention",
            "sliding_attention",
        }:
            raise RegardError(f"{type(model).__name__} does not keep keys and values in all layers; expected a decoder that does")
        self.model, self.policy, self.config = model, policy, config
        self.modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj") and hasattr(m, "k_proj")]
        if not self.modules:
            raise RegardError(f"{type(model).__name__}: expected attention layers with k_proj, o_proj and layer_idx")
        policy.begin(len(self.modules), config.num_key_value_heads)
        self.name = cache_argument(model)
        self.cache: Any = None
        self.mask: Tensor | None = None
        self.there: Tensor | None = None

    def __enter__(self) -> Session:
        if any(module in _sessions for module in self.modules):
            raise RegardError("a policy is on the model already; expected one, which may wrap others")
        own = str(self.model.config._attn_implementation)
        if own.startswith("regard") or any(view.patches for module in self.modules if (view := routed(module)) is not None):
            raise RegardError(
                f"the model attends by another mechanism ({own if own.startswith('regard') else 'a patch'}), and policies read softmax; expected "
                "the model's own attention: restore the patch, or model.set_attn_implementation('sdpa')"
            )
        self.attending = attending(self.model, NAME, attention)
        self.attending.__enter__()
        for module in self.modules:
            _sessions[module] = self
        self.hook = self.model.register_forward_pre_hook(self.before, with_kwargs=True)
        return self

    def __exit__(self, *why: object) -> None:
        self.hook.remove()
        for module in self.modules:
            _sessions.pop(module, None)
        self.attending.__exit__(None, None, None)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the model a cache of layers that can forget."""
        cache = kwargs.pop("cache", None)
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        if cache is None:
            cache = fresh_cache(len(self.modules))
        if not all(isinstance(layer, KeptLayer) for layer in cache.layers) or not cache.layers:
            from transformers import DynamicCache, StaticCache

            if type(cache) not in (DynamicCache, StaticCache) or cache.get_seq_length():
                raise RegardError(
                    f"cache {type(cache).__name__} of {int(cache.get_seq_length())} tokens: expected none, or a new DynamicCache or StaticCache"
                )
            cache.layers = fresh_cache(len(self.modules)).layers
        self.cache, self.mask = cache, None
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # by kind of layer, as `generate` gives a static cache's model; they tell of the same padding
            mask = next(iter(mask.values()))
        if mask is not None and mask.dim() != 2:
            raise RegardError(f"attention_mask {tuple(mask.shape)}: expected (B, tokens so far) of ones and zeros")
        places = kwargs.get("position_ids")
        if places is not None and places.dim() == 2 and places.shape[1] > 1:
            there = torch.ones_like(places, dtype=torch.bool) if mask is None else mask[:, -places.shape[1] :].bool()
            if bool(((places.diff(dim=1) != 1) & there[:, 1:] & there[:, :-1]).any()):
                raise RegardError("position_ids begin anew within a row, as of packed documents; expected one text a row")
        return args, {**kwargs, self.name: cache, "use_cache": True}

    def attend(self, module: Any, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """(B, n, H, D) of queries (B, H, n, D) over what the layer remembers and the new tokens."""
        for name in CHANGES:
            if options.get(name) is not None:
                raise RegardError(f"{type(module).__name__} gives its attention {name}, which policies do not know; expected plain softmax")
        layer: KeptLayer = self.cache.layers[module.layer_idx]
        n = query.shape[2]
        if mask is not self.mask or mask is None:  # all layers get the same one
            there = None if mask is None else mask[:, -n:].bool()
            self.mask, self.there = mask, None if there is None or bool(there.all()) else there
        first = layer.seen == 0
        layer.take(self.there)
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        window = options.get("sliding_window") or getattr(module, "sliding_window", None)
        grouped = query.unflatten(1, (self.config.num_key_value_heads, -1))
        places = torch.arange(layer.seen - n, layer.seen, device=query.device)
        views = self.views(layer, grouped, module.layer_idx, first, scale, window)
        parts = [self.policy.compute(view, places) for view in views]
        if len(parts) == 1:
            (out,) = parts
        else:
            out = parts[0].new_empty(*grouped.shape[:4], parts[0].shape[-1])
            for view, part in zip(views, parts, strict=True):
                out[:, view.part.heads] = part
        self.forget(layer, views)
        return out.flatten(1, 2).transpose(1, 2)

    def views(self, layer: KeptLayer, query: Tensor, at: int, first: bool, scale: float, window: int | None) -> list[View]:
        """A call of layer `at`, query (B, Hkv, group, n, D), as each part sees it."""
        alone = len(layer.parts) == 1  # then all heads in their order
        queries = [query if alone else query.index_select(1, part.heads) for part in layer.parts]
        pairs = zip(layer.parts, queries, strict=True)
        return [View(at, len(self.modules), first, layer.prompt, part, q, scale, window, layer.memory) for part, q in pairs]

    @torch.no_grad()
    def forget(self, layer: KeptLayer, views: list[View]) -> None:
        """The policy sees a call, and drops what does not stay; a part may become several."""
        number = 0
        for view in views:
            before = len(layer.parts)
            self.policy.run(layer, number, view)
            number += 1 + len(layer.parts) - before

    def recall(self, prompt: Prompt) -> Any:
        """The cache that reading `prompt` would have left; for policies that attend prompts whole, so that one reading serves many."""
        if not self.policy.whole_prompts:
            raise RegardError(f"{type(self.policy).__name__} reads prompts in its own way; expected a policy that attends them whole")
        self.cache = fresh_cache(len(self.modules))
        for at, (layer, call) in enumerate(zip(self.cache.layers, prompt.calls, strict=True)):
            layer.update(call.part.keys, call.part.values)
            layer.take(prompt.there)
            self.forget(layer, self.views(layer, call.query, at, True, call.scale, call.window))
        return self.cache
