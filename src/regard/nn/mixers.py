"""Any causal system by name as the token mixer of a decoder: mechanisms inside `Attention`, and layers of their own."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from torch import nn

from ..algebra import Mechanism
from ..catalog import get
from ..catalog.registry import entries, entry
from ..errors import RegardError
from .attention import Attention


def is_mixer(factory: Any) -> bool:
    """Whether a registered class is a layer x (B, L, dim) -> (B, L, dim) that also steps, made from dim (and heads)."""
    if not (inspect.isclass(factory) and issubclass(factory, nn.Module) and hasattr(factory, "step")):
        return False
    parameters = inspect.signature(factory).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return "dim" in needed and set(needed) <= {"dim", "heads"}


def mixer_names() -> list[str]:
    """Layers of their own that `mixer` makes by name."""
    return sorted(name for name, one in entries().items() if one.kind == "module" and is_mixer(one.factory))


def mixer(
    spec: str | Mechanism,
    dim: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    rope: bool = False,
    context_len: int = 1024,
    **options: Any,
) -> nn.Module:
    """The layer of a name or description: forward (B, L, dim) -> (B, L, dim), and step(x, state). options: the system's hyperparameters.

    kv_heads, rope and context_len are those of `Attention`; layers of their own (`mixer_names`) choose for themselves.
    """
    if isinstance(spec, str) and entry(spec).kind != "mechanism":
        factory = entry(spec).factory
        if not is_mixer(factory):
            raise RegardError(f"{spec!r} is no layer that steps through a sequence; those that are: {', '.join(mixer_names())}")
        known = inspect.signature(factory).parameters
        for key in options:
            if key not in known:
                raise RegardError(f"{spec!r} has no hyperparameter {key!r}; it has: {', '.join(known)}")
        given: dict[str, Any] = {"heads": heads} if "heads" in known else {}
        if "causal" in known:
            given["causal"] = True
        made: nn.Module = factory(dim=dim, **{**given, **options})
        return made
    mechanism = get(spec, **options) if isinstance(spec, str) else spec
    return Attention(dim, heads, mechanism, kv_heads=kv_heads, rope=rope, context_len=context_len)


def parsed(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and hyperparameters of "name:key=value,..."; values are Python literals or bare words."""
    name, _, rest = spec.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise RegardError(f"mechanism {spec!r}: {item!r} is not key=value")
        try:
            options[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[key.strip()] = value.strip()
    return name.strip(), options
