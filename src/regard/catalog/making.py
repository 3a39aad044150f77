"""What PyTorch's layers have and the zoo's get when they are registered: `device=`, `dtype=` of the constructor, and `reset_parameters()`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import nn

from ..engine.reference import numbers_in
from ..engine.sharding import spread
from ..errors import RegardError

P = ParamSpec("P")
Made = TypeVar("Made", bound=type)


def placed(init: Callable[P, None]) -> Callable[P, None]:
    """Let a layer's constructor take `device` and `dtype` as PyTorch's layers do: all it makes is made there, and so."""

    @functools.wraps(init)
    def run(*args: P.args, **given: P.kwargs) -> None:
        device, dtype = given.get("device"), given.get("dtype")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise RegardError(f"dtype={dtype}; expected a floating dtype such as torch.float32 or torch.bfloat16")
        with numbers_in(dtype), nullcontext() if device is None else torch.device(device):  # type: ignore[call-overload]
            init(*args, **given)

    return run


def reset_parameters(self: nn.Module) -> None:
    """Draw all parameters and buffers anew, in place, as the constructor does; layers that were handed to it stay as they are. Of parameters
    that processes share (FSDP2), the first process's draw counts."""
    args, given = cast(tuple[tuple[Any, ...], dict[str, Any]], self._made_with)
    kept = next((x for x in (*self.parameters(), *self.buffers()) if x.is_floating_point()), None)
    if kept is not None and kept.is_meta:
        raise RegardError("reset_parameters() of a layer on the meta device; give it memory first: layer.to_empty(device=...)")
    with numbers_in(None if kept is None else kept.dtype), nullcontext() if kept is None else kept.device:
        fresh = type(self)(*args, **given)
    with torch.no_grad():
        for own, new in ((self.named_parameters(), dict(fresh.named_parameters())), (self.named_buffers(), dict(fresh.named_buffers()))):
            for name, x in own:
                x.copy_(spread(new[name], x))


def placeable(layer: Made) -> Made:
    """Give a class of layers `device=` and `dtype=`, and `reset_parameters()` where it has none; once a class. Other classes stay as they are."""
    if not issubclass(layer, nn.Module) or "_placeable" in vars(layer):
        return layer
    init = layer.__init__
    named = {"device", "dtype"} & set(inspect.signature(init).parameters)

    @functools.wraps(init)
    def run(self: nn.Module, *args: Any, **given: Any) -> None:
        where = {key: given.pop(key) for key in ("device", "dtype") if key in given and key not in named}

        @placed
        def make(device: Any = None, dtype: Any = None) -> None:
            init(self, *args, **given)

        make(**where)
        vars(self)["_made_with"] = (args, given)  # the outermost constructor's stays

    added = {"__init__": run, "_placeable": True}
    if not hasattr(layer, "reset_parameters"):
        added["reset_parameters"] = reset_parameters
    for name, what in added.items():
        setattr(layer, name, what)
    return layer
