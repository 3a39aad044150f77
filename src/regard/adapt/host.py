"""Where a transformers model attends: its attention modules, what they run themselves, and the view of a config that calls regard."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import MissingDependency, RegardError

NAME = "regard"
HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_attn_heads", "n_head")
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")

_lookups: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


class Routed:
    """A config as one patched attention module sees it: everything is the model's, but attention calls come to regard.

    patches: of this module, the newest last. station: what looks at its calls from above all patches, or None. Nothing else in the model
    changes, so that other modules, other models of the same config, and the masks the model makes, stay as they are. A copy of the module
    has the plain config: a patch belongs to one model.
    """

    _attn_implementation = NAME

    def __init__(self, own: Any):
        self.__dict__.update(own=own, patches=[], station=None, calls=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["own"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.own, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__dict__["own"], memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (self.__dict__["own"],)


def routed(module: nn.Module) -> Routed | None:
    config = module.__dict__.get("config")
    return config if isinstance(config, Routed) else None


def viewed(module: nn.Module) -> Routed:
    """The module's view, made if it has none."""
    view = routed(module)
    if view is None:
        view = Routed(module.config)
        module.config = view  # type: ignore[assignment]
        module.register_forward_hook(reached)
    return view


def route(module: nn.Module, patch: Any) -> None:
    """Send the module's attention calls to `patch`, and before that to no other. RegardError inside a cache policy, which reads softmax."""
    if own_name(module).startswith(f"{NAME}_"):
        raise RegardError("a cache policy is at work in this model, and policies read softmax; expected the patch without the policy")
    viewed(module).patches.append(patch)


def unroute(module: nn.Module, patch: Any) -> None:
    """Take `patch` off; with the last one the module has its own config back."""
    view = routed(module)
    if view is not None and patch in view.patches:
        view.patches.remove(patch)
        leave(module, view)


def watch(module: nn.Module, station: Any) -> None:
    """Show the module's attention calls to `station`, above whatever patches there are; None: to nobody."""
    view = viewed(module)
    view.station = station
    leave(module, view)


def leave(module: nn.Module, view: Routed) -> None:
    """Give the module its own config back if nobody needs the view."""
    if not view.patches and view.station is None:
        module.config = view.own
        unhook(module)


def unhook(module: nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if hook is reached:
            del module._forward_hooks[key]


def reached(module: nn.Module, args: Any, output: Any) -> None:
    """After a patched module ran: its attention must have come to regard, or the patch would have had no effect."""
    view = routed(module)
    if view is None:  # a copy of a patched module, or one restored while it ran
        unhook(module)
    elif not view.calls:
        raise RegardError(
            f"{type(module).__name__} ran without calling its attention function, so that the patch had no effect; expected a module that "
            "goes through transformers' attention interface in every call"
        )
    else:
        view.calls = 0


def lookup_of(kind: type) -> Any:
    """The method of a module class that looks its attention function up in transformers' interface, or None."""
    if kind not in _lookups:
        methods = (
            inspect.unwrap(f) for base in kind.__mro__ if base is not nn.Module for f in vars(base).values() if inspect.isfunction(f)
        )
        _lookups[kind] = next((f for f in methods if "ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names), None)
    return _lookups[kind]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that call the attention interface, in order. RegardError where there are none, or transformers says they may not."""
    from transformers import PreTrainedModel

    found = [m for m in model.modules() if hasattr(m, "config") and not isinstance(m, PreTrainedModel) and lookup_of(type(m))]
    if not found:
        raise RegardError(f"{type(model).__name__} has no attention layer that uses transformers' attention interface")
    owners = {module: parent for parent in model.modules() if isinstance(parent, PreTrainedModel) for module in parent.modules()}
    for module in found:
        check_owner(owners.get(module))
    return found


def check_owner(owner: Any) -> None:
    """Raise where transformers itself would not exchange the attention of this model (None: modules of no model)."""
    if owner is None:
        return
    name = type(owner).__name__
    if not owner._can_set_attn_implementation():
        raise RegardError(f"{name} computes attention itself: not all of it goes through transformers' attention interface")
    if not (owner._supports_sdpa or owner._supports_attention_backend):
        raise RegardError(
            f"{name} supports only attention of its own, transformers says (neither _supports_sdpa nor _supports_attention_backend); "
            "expected a model whose attention can be exchanged"
        )


def own_name(module: nn.Module) -> str:
    """The name of the attention that the model runs by itself: "eager", "sdpa", ..."""
    view = routed(module)
    name = (view.own if view is not None else module.config)._attn_implementation  # type: ignore[union-attr]
    return "sdpa" if name == NAME else str(name or "eager")


def mask_form(module: nn.Module) -> str:
    """The attention function whose masks the model makes: regard's names get them as SDPA does."""
    name = own_name(module)
    return "sdpa" if name.startswith(f"{NAME}:") else name


def own_eager(module: nn.Module, kind: type | None = None) -> Callable[..., Any] | None:
    """The plain attention function that stands beside the module's class, or another."""
    lookup = lookup_of(kind or type(module))
    names = [name for name in lookup.__code__.co_names if name.endswith("eager_attention_forward")]
    return lookup.__globals__.get(names[0]) if names else None  # type: ignore[no-any-return]


def own_attention(module: nn.Module, kind: type | None = None) -> Callable[..., Any]:
    """The attention function that the model would have called. kind: the class that the module stands for (None: its own)."""
    eager, name = own_eager(module, kind), own_name(module)
    if name == "eager" and eager is None:
        raise RegardError(f"{type(module).__name__} has no plain attention function; expected model.set_attn_implementation('sdpa')")
    found: Callable[..., Any] = lookup_of(kind or type(module)).__globals__["ALL_ATTENTION_FUNCTIONS"].get_interface(name, eager)
    return found


@functools.lru_cache(maxsize=512)
def named_by(function: Callable[..., Any]) -> frozenset[str]:
    """The keyword arguments that an attention function reads by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds)


def cache_argument(model: nn.Module) -> str:
    """The name under which a model's forward takes its cache: transformers 5.40 renames it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def shape_of(module: nn.Module) -> tuple[int, int, int]:
    """(heads, kv_heads, head_dim) of an attention module: its own numbers where it has them, else its config's."""
    config: Any = module.config

    def first(*names: str, of: Any = module) -> int | None:
        return next((x for name in names for x in [getattr(of, name, None)] if isinstance(x, int) and not isinstance(x, bool)), None)

    heads = first(*HEADS) or first("num_attention_heads", of=config)
    if heads is None:
        raise RegardError(f"{type(module).__name__} does not say how many heads it has; expected one of {', '.join(HEADS)}")
    groups = first("num_key_value_groups")
    kv_heads = first("num_key_value_heads") or (heads // groups if groups else heads)
    width = first(*WIDTHS) or first("head_dim", of=config)
    if width is None:
        size = first("hidden_size", "d_model", of=config)
        if size is None:
            raise RegardError(f"{type(module).__name__} does not say how wide its heads are; expected one of {', '.join(WIDTHS)}")
        width = size // heads
    return heads, kv_heads, width


def interface(forward: Callable[..., Any]) -> None:
    """Make `regard` known to transformers: `forward`, and masks as SDPA gets them."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as missing:
        raise MissingDependency("regard.adapt needs transformers: pip install 'regard[hf]'") from missing
    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
