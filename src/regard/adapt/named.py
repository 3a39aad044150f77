"""Mechanisms that a transformers config names: attn_implementation="regard", "regard:softpick" or "regard:moba?block_size=64&top_k=3"."""

from __future__ import annotations

import ast
import functools
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from ..algebra import Mechanism, Sizes
from ..catalog import get
from ..engine.policy import Policy
from ..errors import RegardError
from ..nn.inputs import Inputs
from .call import Call
from .host import NAME, interface, routed, shape_of
from .patch import Patch, forward

PREFIX = f"{NAME}:"


@functools.lru_cache(256)
def described(name: str) -> Mechanism:
    """The mechanism of an attn_implementation; RegardError where it names none."""
    if name == NAME:
        return get("softmax")
    plain, _, rest = name.removeprefix(PREFIX).partition("?")
    options: dict[str, Any] = {}
    try:
        given = parse_qsl(rest, keep_blank_values=True, strict_parsing=bool(rest))
    except ValueError:
        raise RegardError(f"attn_implementation={name!r}: {rest!r} is not key=value&key=value") from None
    for key, value in given:
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return get(plain, **options)


class Named(Patch):
    """A mechanism in every layer of a kind, by name: nothing of it belongs to one model, so it can have learned nothing."""

    def __init__(self, name: str, module: nn.Module, device: torch.device):
        self.mechanism, self.name, self.when, self.given = described(name), name, "both", {}
        self.dressed, self.heads, self.modules = {}, None, [module]
        if isinstance(self.mechanism, Policy):
            raise RegardError(
                f"attn_implementation={name!r} is a policy for prompts; expected regard.adapt.patch(model, ..., when='prefill')"
            )
        heads, kv_heads, width = shape_of(module)
        self.shapes = [(heads, kv_heads, width)]
        inputs = Inputs(self.mechanism, Sizes(1, heads, kv_heads, 1024, 1024, width, width), None)
        if list(inputs.parameters()):
            learned = ", ".join(inputs.learned)
            raise RegardError(
                f"attn_implementation={name!r} learns tensors ({learned}), which a config cannot hold; expected "
                f"regard.adapt.patch(model, {name.removeprefix(PREFIX).partition('?')[0]!r}), which keeps them in patch.inputs"
            )
        self.inputs = nn.ModuleList([inputs.to(device)])
        self.probe(self.mechanism, device)
        self.modules = []  # nothing of the model is held

    def at(self, module: nn.Module) -> int:
        return 0


_known: dict[tuple[Any, ...], Named] = {}


def attention(name: str) -> Any:
    """The attention function of a name, as transformers calls it. A patched or tapped module asks by regard's plain name."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, Any]:
        if name == NAME and routed(module) is not None:
            return forward(module, query, key, value, attention_mask, **given)
        found = Call(module, query, key, value, attention_mask, given)
        mark = (name, type(module), shape_of(module), getattr(module, "is_causal", None), query.device)
        if mark not in _known:
            _known[mark] = Named(name, module, query.device)
        answer = _known[mark].run(found)
        assert answer is not None
        return answer

    described(name)
    return attend


class Anything(str):
    """In transformers' list of attention functions: every name that regard can describe. Wrong ones are refused by name."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and other.startswith(PREFIX) and other != str(self):
            described(other)
            return True
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        return str.__hash__(self)


class Names(dict[str, Any]):
    """transformers' functions by name, and those of regard made when they are asked for."""

    def __init__(self, own: dict[str, Any], make: Any):
        super().__init__(own)
        self.make = make
        self[Anything(f"{PREFIX}softmax")] = make(f"{PREFIX}softmax")

    def __missing__(self, name: Any) -> Any:
        if not isinstance(name, str) or not name.startswith(PREFIX):
            raise KeyError(name)
        self[name] = found = self.make(name)
        return found

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(PREFIX) and described(name) is not None)


def register() -> None:
    """Make the names known to transformers, for every model, loaded or to come. MissingDependency without transformers."""
    interface(attention(NAME))
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not isinstance(AttentionInterface._global_mapping, Names):
        AttentionInterface._global_mapping = Names(AttentionInterface._global_mapping, attention)
        AttentionMaskInterface._global_mapping = Names(AttentionMaskInterface._global_mapping, lambda name: sdpa_mask)
