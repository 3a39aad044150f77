"""Another mechanism in a Hugging Face model, through transformers' attention interface; its code and its weights are not touched."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Causal, Mechanism, Program, Sizes, Weighted
from ..catalog import get
from ..engine import attend
from ..engine.policy import Policy
from ..errors import MissingDependency, RegardError
from ..nn.inputs import Inputs
from .padding import attend_spans
from .policies import check_policy, run_policy

WHEN = ("prefill", "decode", "both")
Call = Callable[..., tuple[Tensor, Any]]

_patches: weakref.WeakKeyDictionary[nn.Module, list[Patch]] = weakref.WeakKeyDictionary()  # by attention module, the newest last


def patch(
    model: nn.Module,
    mechanism: str | Mechanism | Policy,
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    when: str = "both",
    **inputs: Any,
) -> Patch:
    """Run `mechanism` in the attention layers of a transformers model, until `.restore()` or the end of a `with` block.

    layers, heads: which (None: all; the others keep softmax). when: "prefill" (several queries at once), "decode" (one query) or "both".
    inputs: tensors the mechanism declares, the same in every layer; learned ones not given become parameters of the patch
    (`patch.inputs`, a module per layer). Grouped heads, padding masks and caches work as the model gives them. A policy (an object that
    knows layers, such as `LongHeads`, `Ltri` or `ReuseLayers`) runs prompts only, whole and without padding.
    Raises RegardError for models that do not use transformers' attention interface, unknown layers or heads, and mechanisms whose
    inputs are projected from the layer's x; MissingDependency without transformers.
    """
    return Patch(model, mechanism, layers, heads, when, inputs)


class Patch:
    """A mechanism at work in a model; see `patch`. inputs: the learned tensors of each patched layer."""

    def __init__(
        self,
        model: nn.Module,
        mechanism: str | Mechanism | Policy,
        layers: Iterable[int] | None,
        heads: Iterable[int] | None,
        when: str,
        given: dict[str, Any],
    ):
        if when not in WHEN:
            raise RegardError(f"when={when!r}; expected one of {', '.join(WHEN)}")
        interface()
        self.model, self.when, self.given = model, when, given
        self.mechanism = get(mechanism) if isinstance(mechanism, str) else mechanism
        modules = attention_modules(model)
        self.modules = [modules[at] for at in chosen("layers", layers, len(modules))]
        if isinstance(self.mechanism, Policy):
            check_policy(self.mechanism, self.modules[0], when, heads, given)
        self.heads = None if heads is None else chosen("heads", heads, shape_of(self.modules[0], model)[0])
        self.inputs = nn.ModuleList([self.inputs_of(module) for module in self.modules])
        earlier = next((found[0] for module in modules for found in [_patches.get(module)] if found), None)
        self.before: list[tuple[Any, str]] = (
            earlier.before if earlier else [(config, config._attn_implementation) for config in configs_of(model)]
        )
        for config, _ in self.before:
            config._attn_implementation = "regard"
        for module in self.modules:
            _patches.setdefault(module, []).append(self)

    def inputs_of(self, module: nn.Module) -> Inputs:
        heads, kv_heads, width = shape_of(module, self.model)
        if isinstance(self.mechanism, Policy):
            return Inputs(Weighted(), Sizes(1, heads, kv_heads, 1024, 1024, width, width), None)
        made = Inputs(self.mechanism, Sizes(1, heads, kv_heads, 1024, 1024, width, width), None)
        made.items = tuple(item for item in made.items if item.name not in self.given)
        return made.to(next(self.model.parameters()).device)

    def run(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor | None:
        """(B, H, Lq, Dv), or None where this call is not the patch's."""
        if self.when == ("prefill" if q.shape[2] == 1 else "decode"):
            return None
        if isinstance(self.mechanism, Policy):
            return run_policy(self.mechanism, self.modules.index(module), q, k, v, mask, causal, scale)
        made = {**self.inputs[self.modules.index(module)](None, {"q": q, "k": k, "v": v}), **self.given}
        options: Any = {"mask": mask if mask is not None else Causal() if causal else None}
        if isinstance(mask, Tensor) and isinstance(self.mechanism, Program):
            out = attend_spans(q, k, v, self.mechanism, mask, {"scale": self.scale(scale), **made})
        else:
            out = attend(q, k, v, self.mechanism, scale=self.scale(scale), **options, **made)
        if self.heads is None:
            return out
        mine = torch.zeros(q.shape[1], dtype=torch.bool, device=q.device)
        mine[self.heads] = True
        return torch.where(mine[:, None, None], out, attend(q, k, v, "softmax", scale=scale, **options))

    def scale(self, scale: float | None) -> float | None:
        """The model's scale, where the mechanism has one."""
        mechanism: Any = self.mechanism
        return scale if getattr(getattr(mechanism, "score", mechanism), "scaled", True) else None

    def restore(self) -> None:
        """Give the model its own attention back; nothing of the patch stays in it."""
        for module in self.modules:
            if self in _patches.get(module, []):
                _patches[module].remove(self)
        if not any(_patches.get(module) for module in self.model.modules()):
            for config, name in self.before:
                config._attn_implementation = name

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


def interface() -> None:
    """Make `regard` known to transformers, with the masks its SDPA path gets: bool, or None where causality says it all."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as missing:
        raise MissingDependency("regard.adapt needs transformers: pip install 'regard[hf]'") from missing
    if "regard" not in AttentionInterface().valid_keys():
        AttentionInterface.register("regard", forward)
        AttentionMaskInterface.register("regard", sdpa_mask)


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer: q (B, H, Lq, D), k, v (B, Hkv, Lk, D) -> (B, Lq, H, Dv)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and query.shape[2] > 1 and attention_mask is None
    for patch in reversed(_patches.get(module, [])):
        if dropout:
            raise RegardError(f"dropout={dropout} on attention weights; expected 0 under a patch (model.eval(), or attention_dropout=0)")
        out = patch.run(module, query, key, value, visible(attention_mask), causal, scaling)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal, **more
    )
    return found


def visible(mask: Tensor | None) -> Tensor | None:
    """A model's mask as bool (True: visible); additive masks must be 0 or hugely negative."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not bool((seen | (mask <= -1e4)).all()):
        raise RegardError("the model adds a position bias to its scores through the mask; expected 0 or -inf only")
    return seen


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that call the attention interface, in order."""
    found = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
    if not found:
        raise RegardError(f"{type(model).__name__} has no attention layer that uses transformers' attention interface")
    return found


def configs_of(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


def shape_of(module: nn.Module, model: nn.Module) -> tuple[int, int, int]:
    """(heads, kv_heads, head_dim) of an attention module."""
    config: Any = module.config
    heads = int(config.num_attention_heads)
    width = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None) or config.hidden_size // heads
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(width)


def chosen(name: str, wanted: Iterable[int] | None, count: int) -> list[int]:
    if wanted is None:
        return list(range(count))
    found = list(wanted)
    wrong = [at for at in found if not 0 <= at < count]
    if wrong or not found:
        raise RegardError(f"{name}={found}; expected some of 0 .. {count - 1}")
    return found
