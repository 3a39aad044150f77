"""What taps read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError


class Seen:
    """What was read: `seen[point, layer]` is the tensor of the latest call, `seen.all(point, layer)` those of all calls (where
    keep="all"), `seen.stack(point)` the latest of all layers, one behind another."""

    def __init__(self, keep_all: bool):
        self.keep_all = keep_all
        self.found: dict[tuple[str, int], list[Any]] = {}

    def add(self, point: str, layer: int, x: Any) -> None:
        kept = self.found.setdefault((point, layer), [])
        if not self.keep_all:
            kept.clear()
        kept.append(x)

    def all(self, point: str, layer: int) -> list[Any]:
        if (point, layer) not in self.found:
            known = ", ".join(f"({name!r}, {at})" for name, at in sorted(self.found)) or "nothing: no tapped call has run"
            raise RegardError(f"nothing was seen of {point!r} in layer {layer}; there is {known}")
        return self.found[point, layer]

    def __getitem__(self, key: tuple[str, int]) -> Any:
        return self.all(*key)[-1]

    def __contains__(self, key: object) -> bool:
        return key in self.found

    def layers(self, point: str) -> list[int]:
        return sorted(layer for name, layer in self.found if name == point)

    def items(self, point: str) -> Iterator[tuple[int, Any]]:
        """(layer, its latest tensor), in order."""
        return ((layer, self[point, layer]) for layer in self.layers(point))

    def stack(self, point: str) -> Tensor:
        """(layers, ...) of the layers that were seen, of one shape."""
        found = [x for _, x in self.items(point)]
        if not found or any(not isinstance(x, Tensor) or x.shape != found[0].shape for x in found):
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in found]
            raise RegardError(f"{point!r} was seen as {shapes}; expected tensors of one shape to stack")
        return torch.stack(found)

    def clear(self) -> None:
        self.found.clear()
