"""One attention layer of a host, and what is known of its latest call."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .attending import Attending
from .stream import Hook, Stream, stream_of
from .turning import Through

Run = Callable[[Attending], tuple[Tensor, Any]]


@dataclass
class Clock:
    """Of the latest call of a stack of layers. start: tokens before it in the cache. real (B, tokens so far) bool, or None."""

    start: int = 0
    real: Tensor | None = None
    handle: Any = None
    users: int = 0


class Site(ABC):
    """One attention layer. run: what its calls pass through while it is watched."""

    def __init__(self, model: nn.Module, module: nn.Module, name: str, layer: int, heads: int, kv_heads: int):
        self.module, self.layer, self.heads, self.kv_heads = module, layer, heads, kv_heads
        self.stream: Stream = stream_of(model, name)
        self.run: Run | None = None
        self.clock = Clock()

    @abstractmethod
    def watch(self, run: Run) -> None: ...

    @abstractmethod
    def leave(self) -> None: ...

    @property
    def unturned(self) -> str | None:
        """Why the points before rotary positions are not there, and what to do; None: they are."""
        return "rotary positions of this host are not seen; expected the points q and k"

    def turning(self, through: Through) -> Any:
        """Pass queries and keys `through` before rotary positions turn them, until `remove()`."""
        raise NotImplementedError


_clocks: weakref.WeakKeyDictionary[nn.Module, Clock] = weakref.WeakKeyDictionary()


def cached(bound: dict[str, Any]) -> int:
    """Tokens in the cache that came with a call."""
    more = bound.get("kwargs") or {}
    for name in ("past_key_values", "cache"):
        length = getattr(bound.get(name, more.get(name)), "get_seq_length", None)
        if length is not None:
            return int(length())
    return 0


def told(owner: nn.Module, clock: Clock) -> Any:
    """A hook that reads the cache and the padding of each call of `owner`."""
    known = inspect.signature(owner.forward)

    def run(args: tuple[Any, ...], options: dict[str, Any]) -> None:
        bound = known.bind_partial(*args, **options).arguments
        mask = bound.get("attention_mask")
        clock.start = cached(bound)
        clock.real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    return owner.register_forward_pre_hook(Hook(owner, run), with_kwargs=True)


def clock_of(owner: nn.Module) -> Clock:
    """The clock of a stack of layers, for one more of them."""
    clock = _clocks.setdefault(owner, Clock())
    clock.users += 1
    if clock.handle is None:
        clock.handle = told(owner, clock)
    return clock


def leave_clock(owner: nn.Module) -> None:
    clock = _clocks[owner]
    clock.users -= 1
    if clock.users == 0:
        clock.handle.remove()
        del _clocks[owner]
