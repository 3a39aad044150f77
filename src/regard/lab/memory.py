"""Memory as a program asks for it: the largest tensor made, and the most bytes alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Counts the storages made inside it. largest: elements of the largest tensor; peak: most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage.data_ptr()
                if key not in before and key not in self.known and storage.nbytes():
                    self.known.add(key)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    self.largest = max(self.largest, storage.nbytes() // x.element_size())
                    weakref.finalize(storage, self.free, key, storage.nbytes())
        return out

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def largest_tensor(run: Callable[[], Any]) -> int:
    """Elements of the largest tensor made while `run` runs, backward passes included."""
    with Watch() as watch:
        run()
    return watch.largest


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of tensors made by `run` that are alive at once."""
    with Watch() as watch:
        run()
    return watch.peak
