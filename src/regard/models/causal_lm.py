"""regard's decoder as a transformers model: any mechanism, `generate`, Trainer, safetensors and the Auto classes.

import regard.models.causal_lm                       # the Auto classes know "regard" from here on
model = RegardForCausalLM(RegardConfig(mechanism="gla", vocab_size=256, hidden_size=128))
model.save_pretrained(folder); AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import RegardError
from ..nn.decoder import Decoder
from ..nn.mixers import mixer

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # transformers 5 renames it on its way


class RegardConfig(PretrainedConfig):
    """A `Decoder`. mechanism: a name for all layers, or a list with one a layer. options: hyperparameters, of all layers or a list of such."""

    model_type = "regard"
    keys_to_ignore_at_inference = (CACHE,)

    def __init__(
        self,
        mechanism: str | list[str] = "softmax",
        options: dict[str, Any] | list[dict[str, Any]] | None = None,
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 1024,
        rope: bool = True,
        norm: str = "rms",
        mlp: str = "swiglu",
        layer_scale: float | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.mechanism, self.options = mechanism, options or {}
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads, self.intermediate_size = (
            num_attention_heads,
            num_key_value_heads,
            intermediate_size,
        )
        self.max_position_embeddings, self.rope, self.norm, self.mlp, self.layer_scale = (
            max_position_embeddings,
            rope,
            norm,
            mlp,
            layer_scale,
        )
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)

    def layers(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, hyperparameters) of each layer; RegardError where lists are not as long as the model is deep."""
        found: list[Any] = []
        for what, value in (("mechanism", self.mechanism), ("options", self.options)):
            many = list(value) if isinstance(value, (list, tuple)) else [value] * self.num_hidden_layers
            if len(many) != self.num_hidden_layers:
                raise RegardError(f"{what} names {len(many)} layers; expected num_hidden_layers={self.num_hidden_layers}")
            found.append(many)
        return list(zip(*found, strict=True))


class RegardCache(Cache):
    """What a decoder's layers remember, whatever their mechanisms keep. Rows cannot be moved, so there is no beam search with it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[Any] | None = None
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @property
    def bytes(self) -> int:
        """Bytes held in all layers."""
        return sum(state.bytes for state in self.states or [])

    def refused(self, *args: Any, **kwargs: Any) -> Any:
        raise RegardError(
            "this cache keeps states, which cannot be reordered, repeated or cropped; expected use_cache=False for this way of decoding"
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = crop = update = refused


class RegardForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of any causal mechanism or layer that regard knows by name."""

    config_class = RegardConfig
    config: RegardConfig
    base_model_prefix = "decoder"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # it brings its own attention, whatever the config says
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: RegardConfig):
        super().__init__(config)
        heads, context = config.num_attention_heads, config.max_position_embeddings
        layers = [
            mixer(name, config.hidden_size, heads, kv_heads=config.num_key_value_heads, rope=config.rope, context_len=context, **options)
            for name, options in config.layers()
        ]
        self.decoder = Decoder(
            layers,
            vocab=config.vocab_size,
            dim=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            hidden=config.intermediate_size,
            context_len=context,
            layer_scale=config.layer_scale,
            norm=config.norm,
            mlp=config.mlp,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Layers are made with their own initial values."""

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed = value  # type: ignore[assignment]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> dict[str, Any]:
        cache = more.get(CACHE)
        seen = 0 if cache is None else cache.get_seq_length()
        return {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask, CACHE: cache, "use_cache": more.get("use_cache")}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **more: Any,
    ) -> Any:
        """input_ids (B, L) -> logits (B, L, vocab), of the last `logits_to_keep` tokens if that is not 0; loss with labels (B, L), -100 left out.

        attention_mask (B, L, or all tokens so far with a cache): 0 is padding.
        """
        cache = more.pop(CACHE, None)
        unknown = {key for key, value in more.items() if value is not None and value is not False} - {"num_items_in_batch"}
        if unknown or input_ids is None:
            raise RegardError(
                f"RegardForCausalLM got {sorted(unknown) or 'no input_ids'}; expected input_ids, attention_mask, labels, {CACHE}, use_cache"
            )
        if cache is not None and not isinstance(cache, RegardCache):
            raise RegardError(f"{CACHE} is {type(cache).__name__}; expected a RegardCache, or None")
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[0] != input_ids.shape[0]):
            raise RegardError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, tokens so far), 1 for tokens and 0 for padding"
            )
        so_far = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        if attention_mask is not None and attention_mask.shape[1] != so_far:
            raise RegardError(
                f"attention_mask covers {attention_mask.shape[1]} tokens; expected {so_far}: all so far, those in the cache too"
            )
        keep = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        wanted = use_cache if use_cache is not None else self.config.use_cache and labels is None and not self.training
        if cache is None and not wanted:
            logits = self.decoder(input_ids, keep)
        else:
            cache = RegardCache() if cache is None else cache
            logits, cache.states = self.decoder.step(input_ids, cache.states, keep)
            cache.seen += input_ids.shape[1]
        logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **{k: v for k, v in more.items() if k == "num_items_in_batch"},
            )
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return out if return_dict is not False else out.to_tuple()


AutoConfig.register("regard", RegardConfig, exist_ok=True)
AutoModelForCausalLM.register(RegardConfig, RegardForCausalLM, exist_ok=True)

__all__ = ["CACHE", "RegardCache", "RegardConfig", "RegardForCausalLM"]
