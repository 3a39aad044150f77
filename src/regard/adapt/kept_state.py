"""What a converted layer remembers, as a layer of a transformers cache: a state that does not grow, in place of keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import MissingDependency, RegardError

try:
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer
except ImportError as missing:
    raise MissingDependency("converted models need transformers: pip install 'regard[hf]'") from missing


def mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor of a state changed alike."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple):
        parts = [mapped(x, change) for x in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return dataclasses.replace(state, **{f.name: mapped(getattr(state, f.name), change) for f in dataclasses.fields(state)})
    return state


class StateLayer(CacheLayerMixin):  # type: ignore[misc]
    """state: what the layer's `run` gave last, or None; seen: tokens read, padding included."""

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        del self.keys, self.values  # there are none: what moves rows of keys and values refuses this layer by that
        self.state: Any = None
        self.seen = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the state comes whole."""

    def remember(self, state: Any, tokens: int) -> None:
        self.state, self.seen = state, self.seen + tokens

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = mapped(self.state, lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = mapped(self.state, lambda x: x.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """A state is small: it stays where it is."""

    def prefetch(self) -> None:
        """A state is small: it stays where it is."""

    def refused(self, *args: Any, **kwargs: Any) -> Any:
        raise RegardError("a converted layer keeps a state, which has no rows to add or take back; expected plain or beam decoding")

    update = crop = refused

    @property
    def bytes(self) -> int:
        """Bytes held."""
        total = [0]

        def count(x: Tensor) -> Tensor:
            total[0] += x.numel() * x.element_size()
            return x

        mapped(self.state, count)
        return total[0]


def held(cache: Any, number: int) -> StateLayer:
    """The layer `number` of a cache, which becomes a `StateLayer` when it is first used."""
    while len(cache.layers) <= number:
        cache.layers.append(DynamicLayer())
    found = cache.layers[number]
    if not isinstance(found, StateLayer):
        if not isinstance(found, DynamicLayer) or found.is_initialized:
            raise RegardError(
                f"layer {number} of the cache is {type(found).__name__}{' with keys in it' if found.is_initialized else ''}; expected an "
                "empty DynamicCache, in which a converted layer keeps its state"
            )
        cache.layers[number] = found = StateLayer()
    return found


def state_bytes(cache: Any) -> int:
    """Bytes of all the states in a cache."""
    return sum(layer.bytes for layer in cache.layers if isinstance(layer, StateLayer))


__all__ = ["StateLayer", "held", "mapped", "state_bytes"]
